"""Run by selenium's interpreter: look at a page in headless Chromium and say what was seen.

`PAGE CHROMIUM DRIVER FOLDER`: prints one JSON object; screenshots go to FOLDER.
"""

import base64
import json
import sys
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
ROWS = (
    "return [...document.querySelectorAll('#list tr.latent')].map(row => "
    "[...row.cells].map(cell => cell.innerText.trim()))"
)
OVERFLOW = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
COLOURS = "const of = getComputedStyle(document.body); return [of.backgroundColor, of.color]"


def look(page, chromium, driver_path, folder):
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    # A click or an address may change the page a moment later.
    driver.implicitly_wait(10)
    try:
        return walk(driver, page, folder)
    finally:
        driver.quit()


def walk(driver, page, folder):
    seen = {}

    def rows():
        return driver.execute_script(ROWS)

    def size(width, height=900):
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def scheme(name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def shot(name):
        driver.save_screenshot(str(folder / f"{name}.png"))

    def header(label):
        for button in driver.find_elements(By.CSS_SELECTOR, "#list thead button"):
            if button.text.split("\n")[0].strip() == label:
                return button
        raise LookupError(label)

    def field(name):
        return driver.find_element(By.NAME, name)

    size(1280)
    scheme("light")
    driver.get(page.as_uri())
    seen["title"] = driver.title
    seen["first"] = rows()
    seen["light"] = driver.execute_script(COLOURS)
    shot("light")
    seen["images"] = driver.execute_script(
        "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
    )

    header("layer spread").click()
    seen["by_spread"] = rows()
    header("layer spread").click()
    seen["by_spread_again"] = rows()
    seen["sorted"] = driver.execute_script(
        "return [...document.querySelectorAll('#list th[aria-sort]')]"
        ".map(header => [header.innerText.trim(), header.getAttribute('aria-sort')])"
    )
    driver.find_element(By.XPATH, "//button[text()='Next']").click()
    seen["second_page"] = rows()

    field("layer_mean-from").send_keys("1.5")
    seen["filtered"] = rows()
    seen["status"] = driver.find_element(By.ID, "status").text
    driver.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    field("text").send_keys("PEAK17 ")
    seen["by_text"] = rows()
    field("text").clear()
    driver.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    field("latents").send_keys("5, 17")
    seen["by_id"] = rows()

    # By keyboard: Enter on the latent's button opens it.
    button = driver.find_element(By.CSS_SELECTOR, "#latent-17 button")
    button.send_keys(Keys.ENTER)
    seen["expanded"] = driver.find_element(By.CSS_SELECTOR, "#latent-17 button").get_attribute(
        "aria-expanded"
    )
    detail = driver.find_element(By.ID, "detail-17")
    seen["detail"] = detail.text
    seen["examples"] = driver.execute_script(
        "return [...arguments[0].querySelectorAll('.text')].map(line => [line.textContent, "
        "[...line.querySelectorAll('mark')].map(mark => mark.textContent), "
        "[...line.querySelectorAll('[class]')].map(of => [of.textContent, of.className])])",
        detail,
    )
    seen["shade"] = driver.execute_script(
        "return [...arguments[0].querySelectorAll('.h5, .h10')].slice(0, 2)"
        ".map(of => getComputedStyle(of).backgroundColor)",
        detail,
    )
    seen["overflow"] = {"1280": driver.execute_script(OVERFLOW)}
    size(420)
    seen["overflow"]["420"] = driver.execute_script(OVERFLOW)
    driver.execute_script("document.getElementById('detail-17').scrollIntoView()")
    seen["box_width"] = driver.execute_script(
        "return document.querySelector('#detail-17 .detail-box').getBoundingClientRect().right"
    )
    shot("phone-detail")
    driver.execute_script("scrollTo(0, 0)")
    shot("phone")
    size(1280)
    scheme("dark")
    seen["dark"] = driver.execute_script(COLOURS)
    driver.execute_script("document.getElementById('latents').scrollIntoView()")
    shot("dark")
    driver.find_element(By.CSS_SELECTOR, "#latent-17 button").send_keys(Keys.ENTER)
    seen["closed"] = driver.execute_script("return document.getElementById('detail-17') === null")

    driver.get(page.as_uri() + "#latent-7")
    seen["linked"] = driver.find_element(By.ID, "detail-7").is_displayed()
    scheme("light")
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    (folder / "page.pdf").write_bytes(base64.b64decode(printed["data"]))
    try:
        seen["alert"] = driver.switch_to.alert.text
    except NoAlertPresentException:
        seen["alert"] = None
    seen["console"] = [entry["message"] for entry in driver.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    seen["requests"] = sorted(
        {
            event["params"]["request"]["url"].partition("#")[0].partition(",")[0]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
            # The browser's own first tab asks for what it needs.
            and not event["params"]["documentURL"].startswith("chrome://")
        }
    )
    return seen


if __name__ == "__main__":
    target, binary, driver_binary, out = sys.argv[1:]
    print(json.dumps(look(Path(target), binary, driver_binary, Path(out))))
