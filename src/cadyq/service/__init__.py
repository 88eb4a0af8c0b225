"""`cadyq serve`: upscaling over HTTP, and a page to look at. Needs the extra ``[web]``."""
