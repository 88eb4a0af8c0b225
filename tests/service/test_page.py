"""The page in a real Chromium: from a picture to its download, by mouse and by keyboard, large and small."""

import os
import re
import shutil

import pytest
from services import MODEL, png

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [web-test]")

CHROMIUM = os.environ.get("CADYQ_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"desktop": (1280, 800, "light"), "phone": (390, 844, "dark")}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium; set CADYQ_CHROMIUM")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser, service, request):
    """The page, freshly opened; what the console complains about fails the test, and so do foreign requests."""
    width, height, scheme = SIZES[getattr(request, "param", "desktop")]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    found = context.new_page()
    complaints, requests = [], []
    found.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda one: requests.append(one.url))
    found.goto(service)
    found.wait_for_selector("#model option", state="attached")
    yield found
    context.close()
    assert not [text for text in complaints if "favicon" not in text and "422" not in text]
    assert not [url for url in requests if not url.startswith((service, "blob:", "data:"))]


def choose(page, content, name="photo.png", kind="image/png"):
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def finish(page):
    page.wait_for_selector('body[data-state="done"]', timeout=60_000)


def pixel(page, x, y):
    """The color of the stage at a share of its width and height."""
    return page.evaluate(
        """([x, y]) => {
            const c = document.getElementById("view");
            return [...c.getContext("2d").getImageData(c.width * x, c.height * y, 1, 1).data];
        }""",
        [x, y],
    )


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_from_a_picture_to_its_download(page, service, tmp_path):
    import httpx

    choose(page, png())
    finish(page)
    assert re.search(r"256 . 192, \d\.\d\d bits", page.inner_text("#status"))
    with page.expect_download() as waiting:
        page.click("#download")
    download = waiting.value
    assert download.suggested_filename == "photo_x4.png"
    download.save_as(tmp_path / "got.png")
    expected = httpx.post(f"{service}/v1/upscale", params={"model": MODEL}, content=png(), timeout=60).content
    assert (tmp_path / "got.png").read_bytes() == expected


def test_bits_are_shown_and_the_budget_changes_them(page):
    choose(page, png())
    finish(page)
    plain = pixel(page, 0.8, 0.5)
    page.check("#heat")
    page.wait_for_timeout(100)
    assert pixel(page, 0.8, 0.5) != plain
    bits = page.inner_text("#status").split(", ")[-1]
    assert not page.is_visible("#run")
    page.focus("#budget")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert "more" in page.inner_text("#budget-value")
    page.click("#run")
    finish(page)
    assert float(page.inner_text("#status").split(", ")[-1].split()[0]) > float(bits.split()[0])


def test_everything_by_keyboard(page):
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as waiting:
        page.press("#choose:focus", "Enter")
    waiting.value.set_files({"name": "a.png", "mimeType": "image/png", "buffer": png()})
    finish(page)
    page.focus("#divider")
    page.keyboard.press("Home")
    assert page.get_attribute("#divider", "aria-valuenow") == "0"
    for key, expected in (("PageUp", "10"), ("ArrowRight", "12"), ("End", "100")):
        page.keyboard.press(key)
        assert page.get_attribute("#divider", "aria-valuenow") == expected
    page.focus("#view")
    page.keyboard.press("+")
    assert "%" in page.inner_text("#zoom-level")
    page.keyboard.press("0")
    assert page.inner_text("#zoom-level") == "Fit"


def test_the_divider_parts_before_from_after(page):
    choose(page, png())
    finish(page)
    page.wait_for_timeout(100)
    page.focus("#divider")
    page.keyboard.press("End")
    page.wait_for_timeout(100)
    before = pixel(page, 0.7, 0.6)
    page.keyboard.press("Home")
    page.wait_for_timeout(100)
    assert pixel(page, 0.7, 0.6) != before


def test_a_format_the_browser_cannot_show(page):
    choose(page, png(form="TIFF"), "scan.tif", "image/tiff")
    finish(page)
    page.wait_for_timeout(100)
    assert pixel(page, 0.5, 0.5)[3] == 255
    assert page.get_attribute("#download", "download") == "scan_x4.png"


def test_mistakes_are_told_and_the_next_picture_works(page):
    choose(page, b"this is no picture", "notes.png")
    page.wait_for_selector("#error:not([hidden])")
    assert "not a picture" in page.inner_text("#error")
    choose(page, png())
    finish(page)
    assert not page.is_visible("#error")


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_axe_finds_nothing_serious(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra [web-test]")
    for state in ("empty", "done"):
        if state == "done":
            choose(page, png())
            finish(page)
        found = axe.Axe().run(page).response["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        assert not serious, [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]


@pytest.mark.parametrize("page", ["phone"], indirect=True)
def test_a_phone_needs_no_sideways_scrolling(page):
    choose(page, png())
    finish(page)
    wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1]
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, .button')].filter((e) => e.offsetParent)"
        ".map((e) => [e.id, e.getBoundingClientRect().height]).filter(([, height]) => height < 40)"
    )
    assert not small
