"""A user of the page in a browser, and hostile titles."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import Browser

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    '"><svg onload="window.hacked = 3">',
    "javascript:window.hacked=4",
    "</button></template><h1>not a heading</h1>",
    "&lt;b&gt; stays as it is &amp;amp;",
    "{{7*7}} ${7*7} %s",
    "x" * 5000,
    "\u202eright to left \u0000 and a NUL",
    "😀 " * 200,
)


class Reader:
    """Reads and operates the page as a user does."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url

    def all(self, css: str) -> list[WebElement]:
        return self.browser.driver.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        return [element.text for element in self.all(css)]

    def until(self, condition: Callable[[], object]) -> None:
        try:
            WebDriverWait(self.browser.driver, 60, poll_frequency=0.05).until(lambda _: condition())
        except TimeoutException:
            shown = self.browser.driver.find_element("css selector", "body").text
            raise AssertionError(f"the page shows: {shown}\nconsole: {self.browser.console()}") from None

    def say(self, text: str) -> None:
        """Types a message and waits for the answer."""
        turns = len(self.all(".turn"))
        self.all("#request")[0].send_keys(text, Keys.ENTER)
        self.until(lambda: len(self.all(".turn")) == turns + 1)
        self.settle()

    def settle(self) -> None:
        """Waits until no request is pending."""
        self.until(lambda: not self.all("[aria-busy]"))

    def click(self, css: str) -> None:
        self.browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.all(css)[0])
        self.all(css)[0].click()
        self.settle()

    def press(self, *keys: str) -> None:
        ActionChains(self.browser.driver).send_keys(*keys).perform()

    @property
    def focused(self) -> WebElement:
        return self.browser.driver.switch_to.active_element

    def photos_loaded(self) -> int:
        script = "return [...document.querySelectorAll('#cards img')].filter(i => i.complete && i.naturalWidth).length"
        return self.browser.driver.execute_script(script)

    def check(self) -> None:
        """Checks that there are no errors and no requests to other hosts, and that the page fits its window."""
        assert self.browser.errors() == []
        netloc = urlsplit(self.url).netloc.rpartition("@")[2]
        requests = self.browser.requests()
        assert requests and all(urlsplit(url).netloc.rpartition("@")[2] == netloc for url in requests), requests
        assert self.browser.overflow() <= 0
