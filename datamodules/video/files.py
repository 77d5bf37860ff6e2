"""Which files are videos. Without torch and PyAV."""

from lightspan.datamodules.image.picture_files import Kind

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
VIDEOS = Kind("video", "MP4, MOV, MKV, WebM, AVI or MPEG", ENDINGS)
