"""Videos: frames through ffmpeg, what stands still is computed once, sound and subtitles are kept."""

from cadyq.video.convert import Options, Report, upscale_video

__all__ = ["Options", "Report", "upscale_video"]
