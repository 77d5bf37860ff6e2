"""Runs the commands of docs/pictures.md in build/pictures, and writes what they draw, made small, to docs/pictures.

`make pictures` runs: tools/pictures.py [RUN ...], for all runs of the page or those named.
"""

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pictures.md"
WORK = ROOT / "build" / "pictures"
MOST_WIDTH = 840
"""Pixels: what the site shows of a picture on a wide screen."""
REPORT = "report"
"""The picture of a run that is its report in a browser."""


def overlays(page: str) -> dict[str, str]:
    """{name: text} of the YAML files that the page shows."""
    return dict(re.findall(r"^```yaml\n(?=# (\S+)\n)(.*?)^```", page, re.DOTALL | re.MULTILINE))


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(run, words behind `lightspan`) of each command of the page, in order."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            words = shlex.split(line)[1:]
            (run,) = (word.removeprefix("runs/") for word in words if word.startswith("runs/"))
            found.append((run, words))
    return found


def drawn(page: str) -> list[tuple[str, str]]:
    """(run, what) of each picture of the page, which is docs/pictures/RUN-WHAT.png."""
    return [tuple(name.split("-", 1)) for name in re.findall(r"\]\(pictures/([\w-]+)\.png\)", page)]


def small(content: bytes) -> bytes:
    """The picture as a PNG of at most MOST_WIDTH pixels in width and 128 colours."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if picture.width > MOST_WIDTH:
        height = round(picture.height * MOST_WIDTH / picture.width)
        picture = picture.resize((MOST_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(stream, "png", optimize=True)
    return stream.getvalue()


def source(run: str, what: str) -> Path:
    """The file that a run has drawn. Of a report, its top in a browser is taken here."""
    if what != REPORT:
        inside = WORK / "runs" / run / "pictures" / f"{what}.png"
        return inside if inside.exists() else WORK / "runs" / run / f"{what}.png"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit(f"the picture of the report of {run} needs chromium; name the other runs, or install it")
    shot = WORK / f"{run}.png"
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,1250", f"--screenshot={shot}"]
    subprocess.run([browser, *options, (WORK / f"{run}.html").as_uri()], check=True, capture_output=True)
    return shot


def main(*wanted: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    WORK.mkdir(parents=True, exist_ok=True)
    for name, text in overlays(page).items():
        (WORK / name).write_text(text, encoding="utf-8")
    typed = commands(page)
    for run in dict(typed):
        if run in wanted or not wanted:
            shutil.rmtree(WORK / "runs" / run, ignore_errors=True)
            for words in (words for name, words in typed if name == run):
                print("lightspan", *words, flush=True)
                command = [sys.executable, "-m", "lightspan", *words]
                subprocess.run(command, cwd=WORK, check=True, stdout=subprocess.DEVNULL)
            keep(run, [what for name, what in drawn(page) if name == run])


def keep(run: str, pictures: list[str]) -> None:
    """Writes pictures of a run to docs/pictures."""
    for what in pictures:
        target = PAGE.with_suffix("") / f"{run}-{what}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(small(source(run, what).read_bytes()))
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
