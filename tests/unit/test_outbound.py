"""Which URLs and addresses the way out takes, without going there."""

import random
from ipaddress import ip_address
from urllib.parse import urlsplit

import pytest
from pydantic import AnyUrl
from yarl import URL

from forebay.config import OutboundSettings
from forebay.errors import InvalidRequest, SetupError
from forebay.outbound import Outbound, _parse, is_public
from tests.support.clock import FakeClock


def outbound(*allowed: str) -> Outbound:
    return Outbound(OutboundSettings(allowed_networks=allowed), FakeClock())


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://example.com/",
        "HTTPS://Example.COM/Hook",
        "https://example.com:8443/a/b?x=1&y=%20",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]:8443/",
        "https://hooks_1.example.co.uk/a@b:c;d",
        "https://bücher.example/",
        "https://xn--bcher-kva.example/",
        "https://example.com/" + "a" * 2000,
        "https://[64:ff9b::8.8.8.8]/",
    ],
)
def test_a_public_url_is_taken(url: str) -> None:
    outbound().check(url)


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "example.com", "//example.com", "ftp://example.com", "file:///etc/passwd", "gopher://example.com",
        "javascript:alert(1)", "http:example.com", "http:/example.com", "http:///example.com", "http://", "http://:80",
        "http\u017f://example.com", "http://example.com:0", "http://example.com:65536", "http://example.com:",
        "http://example.com:080", "http://example.com:+80", "http://example.com:8\u0660", "http://example.com:80:80",
        "http://user@example.com", "http://user:pass@example.com", "http://@example.com", "http://example.com#x",
        "http://example.com/#", "http://example.com\\@x", "http:\\\\example.com", "http://example.com/\\x",
        "http://exa mple.com", "http://example.com/a b", " http://example.com", "http://example.com ",
        "http://example.com\n", "http://example.com/\r\nX: y", "http://exam\tple.com", "http://example.com/\x00",
        "http://example.com/\x7f", "http://example.com/ü", "http://example.com/%zz", "http://example.com/%",
        "http://example.com/[x]", "http://example%2ecom", "http://[example.com]", "http://[8.8.8.8]", "http://[]",
        "http://[::1", "http://::1/", "http://[2606:4700::1%25eth0]/", "http://[2606:4700::1%eth0]/",
        "http://[[2606:4700::1]]/", "http://[2606:4700::1]x/", "http://example.com.", "http://example..com",
        "http://.example.com", "http://-example.com", "http://example-.com", "http://" + "a" * 64 + ".com",
        "http://" + "a." * 127 + "com", "https://example.com/" + "a" * 2048, "http://8.8.8", "http://8.8.8.8.",
        "http://134744072", "http://0x08080808", "http://010.8.8.8", "http://8.8.8.0x8", "http://0x8.8.8.8", "http://1",
        "http://8.8.8.256", "http://8.8.8.8.8", "http://example.1", "http://example.0x", "http://８.８.８.８",
        "http://8。8。8。8", "http://ⓔxample.com", "http://xn--.com\u3002x", "http://\ud800.com", "http://a\u200db.com",
        "http://exa%00mple.com", "http://example.com,127.0.0.1/", "http://a&b.com", "http://*.com", "http://$(x).com",
    ],
)  # fmt: skip
def test_what_two_parsers_could_read_differently_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        outbound().check(url)
    assert caught.value.code == "url_not_allowed"


def _plain(host: str) -> str:
    """A host in the one spelling that all of its spellings share."""
    inner = host.strip("[]")
    return str(ip_address(inner)) if ":" in inner else inner.encode("idna").decode().lower()


def test_what_is_taken_every_parser_reads_alike() -> None:
    """Two parsers that disagree about a host are how such checks were passed elsewhere."""
    chance = random.Random(24779)
    signs = [*"/\\@:#?%[].-_~ \t\r\n\x00a1xé。１", "//", "..", "%2e", "%00", "127.0.0.1", "@127.0.0.1", "[::1]", ":80"]
    good = ["https://example.com/a?b=c", "http://8.8.8.8:81/", "http://[2606:4700::1]/x", "https://bücher.example"]
    taken = 0
    for url in good * 5000:
        for _ in range(chance.randint(1, 3)):
            place, cut = chance.randint(0, len(url)), chance.randint(0, 2)
            url = url[:place] + chance.choice(signs) + url[place + cut :]
        try:
            target = _parse(url)
        except InvalidRequest:
            continue
        taken += 1
        read = {urlsplit(url).hostname, URL(url).host, AnyUrl(url).unicode_host(), target.url.host}
        assert {_plain(host or "") for host in read} == {target.host}, url
        assert {urlsplit(url).port or target.port, URL(url).port, AnyUrl(url).port, target.url.port} == {target.port}
    assert taken > 1000  # so that there was something to compare


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192", "192.0.2.1", "192.88.99.1",
        "192.168.0.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1",
        "255.255.255.255", "168.63.129.16",
        "::", "::1", "::7f00:1", "::808:808", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8",
        "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::808:808", "100::1",
        "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1",
        "2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254",
        "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2606:4700::1%eth0",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.32.0.0", "192.0.1.1", "223.255.255.255",
     "2001:4860:4860::8888", "2606:4700:4700::1111", "2a00:1450::1", "64:ff9b::8.8.8.8"],
)  # fmt: skip
def test_an_address_that_is_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_an_operator_may_open_networks() -> None:
    opened = outbound("10.0.0.0/8", "fd00::/8")
    for url in ("http://10.1.2.3/", "http://[fd00::1]/", "http://[64:ff9b::10.1.2.3]/"):
        opened.check(url)
    for url in ("http://127.0.0.1/", "http://192.168.0.1/", "http://[fe80::1]/", "http://[::ffff:10.1.2.3]/"):
        with pytest.raises(InvalidRequest, match="not a public one"):
            opened.check(url)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "x.localhost", "a.b.localhost"])
def test_localhost_is_loopback_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest):
        outbound().check(f"http://{name}/")
    outbound("127.0.0.0/8").check(f"http://{name}/")


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "localhost", "", "10.*"])
def test_a_network_that_is_none_ends_the_start(text: str) -> None:
    with pytest.raises(SetupError, match=r"outbound\.allowed_networks"):
        outbound(text)
