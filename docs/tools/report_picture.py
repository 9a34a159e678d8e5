"""Make docs/report.png and docs/report_images.png: parts of a page of `allspark report`, in a browser of 1000 pixels.

for row in supervised allspark_revised; do
    LIST=random_6_0 SEEDS=1 docs/tools/camvid_pretrained.sh data/camvid exp $row
done
python -m allspark report exp/random_6_0/supervised/seed_1 exp/random_6_0/allspark_revised/seed_1 --out report.html
python docs/tools/report_picture.py report.html     # needs chromium and chromedriver
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
PICTURES = {"report.png": ("light", "curves", "classes"), "report_images.png": ("dark", "confusion", "images")}
WIDTH, HEIGHT = 1000, 1500
EDGES = "const box = document.getElementById(arguments[0]).getBoundingClientRect(); return [box.top, box.bottom]"


def main(page: str) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as profile:
        words = ("headless=new", "no-sandbox", f"user-data-dir={profile}", f"window-size={WIDTH},{HEIGHT}")
        for word in (*words, "hide-scrollbars", "disable-background-networking"):
            options.add_argument(f"--{word}")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for name, (scheme, first, last) in PICTURES.items():
                theme = {"name": "prefers-color-scheme", "value": scheme}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
                browser.get(Path(page).resolve().as_uri())
                top, bottom = browser.execute_script(EDGES, first)[0], browser.execute_script(EDGES, last)[1]
                clip = {"x": 0, "y": top, "width": WIDTH, "height": min(bottom - top, HEIGHT), "scale": 1}
                shot = browser.execute_cdp_cmd(
                    "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True, "format": "png"}
                )
                picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
                picture.quantize(256).save(DOCS / name, optimize=True)
        finally:
            browser.quit()


if __name__ == "__main__":
    main(sys.argv[1])
