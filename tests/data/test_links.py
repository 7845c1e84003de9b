"""Links to Amazon in what people write."""

from __future__ import annotations

import html
import json
import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavic.data import links
from lavic.data.links import FORMS, asins, find_links, short_links
from tests.external import EXTERNAL

A, B = "B097CMQVF4", "B079N83MSD"
RELEASED = EXTERNAL / "data/reddit_amazon/all_beauty"

LINKS = {
    "behind letters of another script": f"アマゾンamazon.co.jp/dp/{A}",
    "dp": f"https://www.amazon.com/dp/{A}",
    "dp behind a title": f"https://www.amazon.com/Some-Title-2-Pack/dp/{A}/ref=sr_1_3?keywords=dp",
    "dp/product": f"https://www.amazon.com/dp/product/{A}/ref=x",
    "dp/product behind a shop": f"https://www.amazon.com/shop/dp/product/{A}/ref=x",
    "dp behind a language": f"https://www.amazon.de/-/en/Title-Of-It/dp/{A}",
    "gp/product": f"http://amazon.com/gp/product/{A}?psc=1",
    "gp/product/images": f"www.amazon.com/gp/product/images/{A}/ref=dp_image_0",
    "gp/aw/d": f"https://www.amazon.com/gp/aw/d/{A}/",
    "gp/offer-listing": f"http://www.amazon.com/gp/offer-listing/{A}/ref=dp_olp_new",
    "o/ASIN": f"http://www.amazon.com/o/ASIN/{A}",
    "exec/obidos": f"http://www.amazon.com/exec/obidos/ASIN/{A}/tag-20",
    "exec/obidos/tg/detail": f"http://www.amazon.com/exec/obidos/tg/detail/-/{A}",
    "product-reviews": f"https://www.amazon.com/product-reviews/{A}?pageNumber=2",
    "product-reviews behind a title": f"https://www.amazon.com/A-Title/product-reviews/{A}/",
    "ASIN": f"https://www.amazon.com/ASIN/{A}/",
    "amzn.com": f"https://amzn.com/{A}",
    "amzn.com without scheme": f"amzn.com/{A}.",
    "amzn.asia": f"https://amzn.asia/{A}",
    "the id alone": f"https://www.amazon.com/{A}/",
    "country": f"https://www.amazon.co.uk/dp/{A}",
    "country of two": f"https://www.amazon.com.au/dp/{A}",
    "smile": f"https://smile.amazon.com/dp/{A}",
    "mobile": f"https://m.amazon.co.jp/dp/{A}",
    "port": f"https://www.amazon.com:443/dp/{A}",
    "geni.us": f"https://geni.us/abc?GR_URL=https%3A%2F%2Fwww.amazon.com%2Fdp%2F{A}%3Ftag%3Dx",
    "redirect of Amazon": f"https://www.amazon.com/gp/slredirect/x.html?ie=UTF8&amp;url=%2FA-Title%2Fdp%2F{A}%2Fref%3Dx",
    "redirect of Google": f"https://www.google.com/url?q=https://www.amazon.com/dp/{A}&sa=D",
    "encoded twice": f"https://out.example/?u=https%253A%252F%252Fwww.amazon.com%252Fdp%252F{A}",
    "mark of direction": f"https://www.amazon.com/dp/\u200e{A}",
    "encoded mark of direction": f"https://www.amazon.com/dp/%E2%80%8E{A}",
    "escaped": f"https://www.amazon.com/gp/product/{A}/ref=ppx\\_yo\\_dt\\_b",
    "escaped slashes": f"https:\\/\\/www.amazon.com\\/dp\\/{A}",
    "markdown": f"[this one](https://www.amazon.com/dp/{A})",
    "markdown with the link as its text": f"[https://www.amazon.com/dp/{A}](https://www.amazon.com/dp/{A})",
    "quotes": f'<a href="https://www.amazon.com/dp/{A}">this</a>',
    "punctuation": f"(see https://www.amazon.com/dp/{A}).",
    "underscore after it": f"see _https://www.amazon.com/dp/{A}_ now",
    "entity": f"https://www.amazon.com/s?x=1&#38;asin={A}",
    "lower case": f"https://www.amazon.com/dp/{A.lower()}",
    "capitals": f"HTTPS://WWW.AMAZON.COM/DP/{A}",
    "query": f"https://www.amazon.com/review/create-review?ie=UTF8&asin={A}",
    "spaces in the title": f"https://www.amazon.com/Two%20words%20%28pack%29/dp/{A}",
}
NOTHING = {
    "empty": "",
    "no id": "https://www.amazon.com/dp/",
    "no id behind a title": "https://www.amazon.com/Title/dp/?ref=x",
    "cut id": "https://www.amazon.com/dp/B097CMQ",
    "longer word": f"https://www.amazon.com/dp/{A}7",
    "ten letters": "https://www.amazon.com/dp/bedspreads",
    "search": "https://www.amazon.com/s?k=soap&ref=nb_sb_noss",
    "wish list": "https://www.amazon.com/hz/wishlist/ls/1A2B3C4D5E6F7",
    "photo": "https://m.media-amazon.com/images/I/31dZpcXyBZL.jpg",
    "another host": f"https://www.example.com/dp/{A}",
    "host that ends so": f"https://notamazon.com/dp/{A}",
    "host with a dash": f"https://my-amazon.com/dp/{A}",
    "host that starts so": f"https://www.amazon.com.evil.example/dp/{A}",
    "another shop's link behind it": f"https://www.amazon.com/s?k=x](https://example.com/dp/{A})",
    "short": "https://amzn.to/3HR4q7E",
    "percent": "https://www.amazon.com/dp/%",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_gives_its_item(name: str) -> None:
    assert asins(LINKS[name]) == [A]
    assert asins(f"Try this: {LINKS[name]} it is good") == [A]


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_link_to_an_item_gives_nothing(name: str) -> None:
    assert asins(NOTHING[name]) == []


def test_a_book_has_its_isbn() -> None:
    assert asins("https://www.amazon.com/dp/000255478X https://www.amazon.com/Title/dp/0002554789/") == [
        "000255478X",
        "0002554789",
    ]


def test_several_links_come_in_order_once_each() -> None:
    text = f"[a](https://amzn.com/{B}),[b](https://www.amazon.com/dp/{A})\n\n> https://smile.amazon.com/gp/product/{B}"
    assert asins(text) == [B, A]
    assert [link.asin for link in find_links(text)] == [B, A, B]


def test_a_link_tells_its_form_and_shop() -> None:
    [link] = find_links(f"https://www.amazon.co.uk/gp/product/{A}")
    assert (link.form, link.host) == ("gp/product", "amazon.co.uk")
    assert {link.form for text in LINKS.values() for link in find_links(text)} <= set(FORMS)


def test_short_links_are_listed_and_not_guessed() -> None:
    text = (
        "[x](https://amzn.to/3HR4q7E), https://a.co/d/hjUIJgI and amzn.asia/d/0aBcDe1 "
        f"amzn.com/{A} https://data.com/abcdefg https://a.company/abcdef"
    )
    assert short_links(text) == ["https://amzn.to/3HR4q7E", "https://a.co/d/hjUIJgI", "https://amzn.asia/d/0aBcDe1"]


IDS = st.from_regex(r"B0[0-9A-Z]{8}", fullmatch=True) | st.from_regex(r"[0-9]{9}[0-9X]", fullmatch=True)
HOSTS = st.sampled_from(["www.amazon.com", "smile.amazon.com", "amazon.ca", "m.amazon.co.uk", "www.amazon.com.mx"])
PATHS = st.sampled_from(
    ["/dp/{}", "/A-Title/dp/{}/ref=sr_1", "/gp/product/{}?psc=1", "/gp/aw/d/{}", "/o/ASIN/{}", "/dp/product/{}"]
)
URLS = st.builds(lambda id, host, path: (id, f"https://{host}{path.format(id)}"), IDS, HOSTS, PATHS)
DRESS = st.sampled_from(
    [
        lambda url: url,
        html.escape,
        lambda url: url.replace("_", "\\_"),
        lambda url: url.replace("/", "\\/"),
        lambda url: f"https://geni.us/x?GR_URL={quote(url, safe='')}",
        lambda url: f"https://out.example/?u={quote(quote(url, safe=''), safe='')}",
        lambda url: f"[text]({url})",
        lambda url: f"{url}.",
        lambda url: url.removeprefix("https://"),
    ]
)


@given(st.lists(st.tuples(URLS, DRESS), max_size=5), st.sampled_from([" ", "\n", "\u2028", " and, "]))
def test_every_dressed_link_is_read(links: list, gap: str) -> None:
    text = gap.join(dress(url) for (_, url), dress in links)
    assert asins(text) == list(dict.fromkeys(id for (id, _), _ in links))


WORDS = "https:// www. amazon .com amzn a.co /dp/ /gp/ /d/ B097CMQVF4 % %2F %E2 & &# \\ ]( \u200e \ud83d ?asin= \0"
PIECES = st.sampled_from(WORDS.split())


@given(st.lists(PIECES | st.text(max_size=8)).map("".join))
def test_no_text_raises(text: str) -> None:
    assert all(re.fullmatch(r"B[0-9A-Z]{9}|\d{9}[\dX]", id) for id in asins(text))
    assert len(set(asins(text))) == len(asins(text))
    assert all(url.startswith("https://") for url in short_links(text))


@given(
    st.lists(PIECES | st.sampled_from(["amazon", "AMZN.com", ".", "a.co", "?asin=", "&#47;", f"dp/{A}"])).map("".join)
)
def test_what_is_skipped_holds_no_link(text: str) -> None:
    """A name that no path or query follows is skipped before it is decoded."""
    read = find_links(text), short_links(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_TARGET", re.compile(""))
        assert read == (find_links(text), short_links(text))


def test_a_long_text_takes_linear_time() -> None:
    """A quadratic pattern would not end within the suite's patience."""
    for piece in (
        "amazon.",
        "a.",
        "https://www.amazon.com/",
        "%25",
        "/dp/",
        "/d/",
        "/exec/obidos/",
        "amzn.com/d/aaaaa",
        "-",
    ):
        asins("amazon.com" + piece * 100_000)


@pytest.mark.external
def test_real_comments_give_back_their_items() -> None:
    rows = [json.loads(line) for name in ("valid", "test") for line in (RELEASED / f"{name}.jsonl").open()]
    complete = sum(set(row["gt_items"]) <= set(asins(row["gt"])) for row in rows)
    assert complete >= 0.995 * len(rows), f"{complete} of {len(rows)}"
