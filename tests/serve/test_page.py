"""The page: contrast of its colors, and all it does in headless Chromium."""

import base64
import importlib.resources
import pathlib
import re
import shutil

import pytest
from running_server import wav
from signals import noise_with_pauses

from fastslm_jax import transcribe

PAGE = importlib.resources.files("fastslm_jax.serve").joinpath("page.html").read_text()
LONG = noise_with_pauses(14, pauses=(4.5, 9.5))


def luminance(color: str) -> float:
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """As defined by WCAG 2: 4.5 is needed for text, 3 for borders of controls."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_of_two_colors():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_have_enough_contrast(scheme):
    root = re.findall(r":root \{(.*?)\}", PAGE, re.S)[scheme == "dark"]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", root))
    for text, ground in (
        ("ink", "page"),
        ("ink", "card"),
        ("ink", "tint"),
        ("soft", "page"),
        ("soft", "card"),
        ("soft", "tint"),
        ("accent-ink", "accent"),
        ("bad", "bad-tint"),
        ("bad", "card"),
    ):
        assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for border in ("field", "accent"):
        assert contrast(colors[border], colors["card"]) >= 3, border


def test_the_page_loads_nothing_from_elsewhere():
    assert re.findall(r"https?://[^'\"\s)]+", PAGE) == ["http://www.w3.org/2000/svg"]


# ------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        self.wait("return document.getElementById('model').textContent == 'tiny'")

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, code, seconds=60):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds).until(lambda _: self.js(code))

    def element(self, css):
        return self.driver.find_element("css selector", css)

    def wait_for_result(self):
        self.wait("return job?.isDone && !document.getElementById('actions').hidden")

    def choose(self, path: pathlib.Path):
        self.element("#file").send_keys(str(path))


@pytest.fixture
def page(browser, server):
    return Page(browser, server.url)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "talk.wav").write_bytes(wav(LONG))
    return tmp_path / "talk.wav"


def test_a_file_gives_segments_to_play_and_subtitles(page, file, loaded):
    page.choose(file)
    page.wait_for_result()
    result = loaded.transcribe(LONG)
    shown = page.js("return [...document.querySelectorAll('ol span')].map(e => e.textContent)")
    segments = [segment for segment in result.segments if segment.text]
    assert shown == [" ".join(s.text.split("\0")) for s in segments]
    assert page.js("return job.srt").rstrip("\n") == transcribe.subtitles(result.segments, "srt")
    assert page.js("return job.text") == result.text
    times = page.js("return [...document.querySelectorAll('ol time')].map(e => e.textContent)")
    assert times[0].startswith("0:00 – 0:0")
    assert f"0:14 of audio, {len(segments)} segments" in page.element("#status").text

    page.js("document.querySelectorAll('ol button')[1].click()")
    page.wait("return document.querySelector('ol [aria-current=true]') !== null")
    assert page.js("return document.querySelectorAll('ol button')[1].ariaCurrent") == "true"
    page.wait("return player.paused")
    assert page.js("return player.currentTime") == pytest.approx(segments[1].end, abs=0.3)
    assert not page.element("#wave").get_attribute("hidden")


def test_a_dropped_file_and_the_chosen_task(page, loaded):
    samples = LONG[: 3 * 16_000]
    page.js("document.querySelector('[value=ssum]').click()")
    page.js(
        """const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], 'dropped.wav'));
        dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}));""",
        base64.b64encode(wav(samples)).decode(),
    )
    page.wait_for_result()
    assert page.js("return job.text") == loaded.transcribe(samples, task="ssum").text
    assert page.element("#name").text == "dropped.wav"


def test_a_broken_file_is_one_line(page, tmp_path):
    (tmp_path / "notes.wav").write_text("no audio <img src=x onerror=alert(1)>")
    page.choose(tmp_path / "notes.wav")
    page.wait("return !document.getElementById('error').hidden")
    assert page.element("#error").text.startswith("notes.wav: ")
    assert not page.element("#result").is_displayed()


def test_cancel_frees_the_slot(page, file, server):
    server.close_after = 1
    page.choose(file)
    page.wait("return !document.getElementById('stop').hidden")
    server.wait_for(lambda: server.metric("fastslm_rows_running") > 0, "it runs")
    page.element("#stop").click()
    page.wait("return document.getElementById('status').textContent == 'Cancelled.'")
    server.gate.set()
    server.wait_until_idle()


def test_the_microphone(page):
    page.element("#record").click()
    page.wait("return document.querySelector('#record span').textContent == 'Stop 0:01'")
    page.element("#record").click()
    page.wait_for_result()
    assert page.js("return job.duration") == pytest.approx(1.2, abs=0.7)
    assert page.element("#name").text == "Recording.wav"


def test_keys_reach_every_control(page):
    """Tab stops at the task, the file, the microphone and the instruction, each with a name."""
    from selenium.webdriver import ActionChains, Keys

    names = []
    for _ in range(4):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        names.append(page.driver.switch_to.active_element.accessible_name)
    assert names == ["Transcribe", "Choose a recording", "Record", "Instruction"]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(page, file, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.choose(file)
    page.wait_for_result()
    assert page.js("return document.documentElement.scrollWidth") <= width
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
