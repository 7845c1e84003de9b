"""Which links to photos show the same picture."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavic.data.sources.image_links import amazon_image_id, picture_of

AMAZON_HOST = "https://m.media-amazon.com/images"
AMAZON_URL = f"{AMAZON_HOST}/I/"


@pytest.mark.parametrize(
    ("link", "other"),
    [
        (AMAZON_URL + "71abcDEF.jpg", AMAZON_URL + "71abcDEF._AC_SL1500_.jpg"),
        (AMAZON_URL + "71a+b.jpg", "https://images-na.ssl-images-amazon.com/images/I/71a%2Bb._SX300_.png"),
        (AMAZON_URL + "31x._SS40_.jpg", AMAZON_URL + "31x._AC_US40_.jpg?x=1#y"),
        (AMAZON_URL + "71x._AC_SX679_.jpg", AMAZON_URL + "71x._AC_UL320_QL65_FMwebp_.jpg"),
        (
            AMAZON_URL + "71x._SY300_.jpg",
            "https://m.media-amazon.com/images/W/MEDIAX_792452-T1/images/I/71x._SL99_.jpg",
        ),
        (AMAZON_URL + "71x._CR0,0,300,300_.jpg", AMAZON_URL + "71x.%5FCR0%2c0%2C300%2C300%5F.jpg"),
        (AMAZON_URL + "A1._CLa%7C2140%2C2000%7C81a.png_UL9_.png", AMAZON_URL + "A1._CLa|2140,2000|81a.png_UL9_.png"),
        (AMAZON_URL + "71x._AC_._SX300_.jpg", AMAZON_URL + "71x.jpg"),
        (AMAZON_HOST + "/P/B00.01._SCMZZZZZZZ_.jpg", AMAZON_HOST + "/P/B00.01._SCTHUMBZZZ_.jpg"),
        ("HTTP://Shop.Example/a.jpg#top", "http://shop.example/a.jpg"),
    ],
)
def test_links_to_one_picture(link: str, other: str) -> None:
    assert picture_of(link) == picture_of(other)


@pytest.mark.parametrize(
    ("link", "other"),
    [
        (AMAZON_URL + "71abcDEF.jpg", AMAZON_URL + "71abcDEf.jpg"),
        (AMAZON_URL + "A1._CLa|9,9|81a.png|0,0_UL9_.png", AMAZON_URL + "A1._CLa|9,9|71b.png|0,0_UL9_.png"),
        (AMAZON_URL + "A1._CLa|9,9|81a.png|0,0_UL9_.png", AMAZON_URL + "A1._UL9_.png"),
        (AMAZON_URL + "71x._CR0,0,300,300_.jpg", AMAZON_URL + "71x._CR300,0,300,300_.jpg"),
        (AMAZON_URL + "71x._SX300_CR0,0,300,300_.jpg", AMAZON_URL + "71x._SX600_CR0,0,300,300_.jpg"),
        (AMAZON_URL + "71x._SX300_PE20_.jpg", AMAZON_URL + "71x._SX300_.jpg"),
        (AMAZON_URL + "71x._SX300_NEW7_.jpg", AMAZON_URL + "71x._SX300_.jpg"),
        (AMAZON_HOST + "/P/B00.01._SCMZZZZZZZ_.jpg", AMAZON_HOST + "/P/B00.01.PT02._SCMZZZZZZZ_.jpg"),
        (AMAZON_HOST + "/P/B00.01.PT02.jpg", AMAZON_HOST + "/P/B00.01.PT03.jpg"),
        (AMAZON_HOST + "/P/0000.jpg", AMAZON_HOST + "/I/0000.jpg"),
        (AMAZON_HOST + "/G/01/a/icon._SX9_.gif", AMAZON_HOST + "/G/01/b/icon._SX9_.gif"),
        ("https://shop.example/images/I/1._SX1_.jpg", "https://shop.example/images/I/1._SX2_.jpg"),
        (
            "https://media-amazon.com.evil.example/images/I/1.a.jpg",
            "https://media-amazon.com.evil.example/images/I/1.jpg",
        ),
        ("http://x/a.jpg", "http://x/a.jpg?size=2"),
        ("http://x/A.jpg", "http://x/a.jpg"),
    ],
)
def test_links_to_two_pictures(link: str, other: str) -> None:
    assert picture_of(link) != picture_of(other)


def test_the_id_of_an_image_that_amazon_serves() -> None:
    for url in ("01RmK+J4pJL.gif", "01RmK%2BJ4pJL._AC_UL9_.gif", "01RmK+J4pJL._CR1,2,3,4_.jpg?x"):
        assert amazon_image_id(AMAZON_URL + url) == "01RmK+J4pJL"
    assert amazon_image_id(f"{AMAZON_HOST}/W/x-1/images/I/31x._SX9_.jpg") == "31x"
    assert amazon_image_id(f"{AMAZON_HOST}/G/01/icons/no-img-sm._CB12_.gif") == "01/icons/no-img-sm"
    assert amazon_image_id("https://shop.example/images/I/31x.jpg") is None
    assert amazon_image_id("http://[") is None


@given(st.text(max_size=300))
def test_any_text_is_some_picture(url: str) -> None:
    assert picture_of(url) == picture_of(url) and isinstance(picture_of(AMAZON_URL + url), str)
