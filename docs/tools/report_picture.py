"""Make docs/report.png and docs/report_images.png: parts of a page of `allspark report`, in a browser of 1000 pixels.

for row in supervised allspark_revised; do
    LIST=random_6_0 SEEDS=1 docs/tools/camvid_pretrained.sh data/camvid exp $row
done
python -m allspark report --out report.html supervised=exp/random_6_0/supervised/seed_1 \\
    allspark_revised=exp/random_6_0/allspark_revised/seed_1
python docs/tools/report_picture.py report.html    # needs chromium and chromedriver
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver

DOCS = Path(__file__).resolve().parents[1]
WIDTH = 1000
PICTURES = {  # name -> color scheme, and sections with the pixels of their height that are shown
    "report.png": ("light", {"curves": 725, "classes": 900}),
    "report_images.png": ("dark", {"confusion": 480, "images": 680}),
}
EDGES = "const box = document.getElementById(arguments[0]).getBoundingClientRect(); return [box.top, box.bottom]"


def main(page: str) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as profile:
        words = ("headless=new", "no-sandbox", f"user-data-dir={profile}", f"window-size={WIDTH},900")
        for word in (*words, "hide-scrollbars", "disable-background-networking"):
            options.add_argument(f"--{word}")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for name, (scheme, sections) in PICTURES.items():
                theme = {"name": "prefers-color-scheme", "value": scheme}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
                browser.get(Path(page).resolve().as_uri())
                strips = [screenshot(browser, section, height) for section, height in sections.items()]
                picture = Image.new("RGB", (WIDTH, sum(strip.height for strip in strips)))
                top = 0
                for strip in strips:
                    picture.paste(strip, (0, top))
                    top += strip.height
                picture.quantize(256).save(DOCS / name, optimize=True)
        finally:
            browser.quit()


def screenshot(browser: webdriver.Chrome, section: str, height: int) -> Image.Image:
    top, bottom = browser.execute_script(EDGES, section)
    clip = {"x": 0, "y": top, "width": WIDTH, "height": min(bottom - top, height), "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


if __name__ == "__main__":
    main(sys.argv[1])
