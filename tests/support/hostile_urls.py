"""URLs that lead, in one reading or another, to a loopback port that nobody may reach. It refuses to be complete."""

_HOSTS = [
    # IPv4 by every spelling that some parser knows.
    *("127.0.0.1", "127.1", "127.0.1", "127.000.000.001", "127.0.0.01", "2130706433", "017700000001"),
    *("0x7f000001", "0x7f.0.0.1", "0x7f.1", "0x7F.0x0.0x0.0x1", "0177.0.0.1", "0177.0.0.01", "127.0.0x0.1"),
    *(
        "127.0.0.1.",
        "127.0.0.2",
        "127.255.255.254",
        "0.0.0.0",
        "0",
        "0x0",
        "00",
        "0.0",
        "127.0.0.1%00",
        "4294967295",
    ),
    *("127.0.0.1%20", "127%2e0%2e0%2e1", "%31%32%37.0.0.1", "127.0.0.1,example.com", "1.1.1.1,127.0.0.1"),
    *("10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16"),
    *("192.0.0.192", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "2852039166", "0xa9fea9fe"),
    # IPv6 and what hides in it.
    *("[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[0000::0001]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::127.0.0.1]", "[::7f00:1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]"),
    *("[2002:7f00:1::]", "[2002:7f00:1::1]", "[2001:0:7f00:1::80ff:fffe]", "[fe80::1]", "[fe80::1%25lo]"),
    *("[::1%25lo]", "[::1%lo]", "[fd00:ec2::254]", "[fc00::1]", "[ff02::1]", "[fec0::1]", "[::ffff:0:127.0.0.1]"),
    # Brackets that are none.
    *("[127.0.0.1]", "[localhost]", "[example.com]", "[[::1]]", "[::1", "::1", "[::1]x", "[1.1.1.1]@127.0.0.1"),
    # Names.
    *(
        "localhost",
        "LOCALHOST",
        "LocalHost",
        "localhost.",
        "localhost..",
        "a.localhost",
        "localhost%00.example.com",
    ),
    *("loopback.example.com", "127.0.0.1.nip.example", "localtest.example", "rebind.example.net", "metadata"),
    *("metadata.google.internal", "instance-data", "kubernetes.default.svc", "intranet"),
    # Unicode digits, dots and letters.
    *(
        "１２７.０.０.１",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "127．0．0．1",
        "127｡0｡0｡1",
        "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "ｌｏｃａｌｈｏｓｔ",
    ),
    *("𝟏𝟐𝟕.𝟎.𝟎.𝟏", "loc\u200balhost", "loc\u00adalhost", "127.0.0.1\u3000", "localhoſt", "locaⅼhost"),
]


def hostile_urls(port: int) -> list[str]:
    """More than a hundred of them; names are for a resolver that answers loopback to everything."""
    urls = [f"http://{host}:{port}/" for host in _HOSTS]
    here = f"127.0.0.1:{port}"
    urls += [
        # Users, backslashes, fragments and white space, on which parsers disagree.
        *(f"http://example.com@{here}/", f"http://a:b@{here}/", f"http://{here}@example.com/", f"http://@{here}/"),
        *(f"http://example.com\\@{here}/", f"http://{here}\\@example.com/", f"http://example.com#@{here}/"),
        *(f"http://{here}#@example.com/", f"http://{here}\\.example.com/", f"http:\\\\{here}\\", f"http:/\\{here}/"),
        *(f"http:{here}/", f"http:/{here}/", f"http:///{here}/", f"//{here}/", f"http://example.com:80@{here}/"),
        *(f"http://example.com%40{here}/", f"http://example.com%23@{here}/", f"http://example.com?@{here}/\\"),
        *(
            f" http://{here}/",
            f"http://{here} /",
            f"http://\t{here}/",
            f"ht\ntp://{here}/",
            f"http://127.0.0\n.1:{port}/",
        ),
        *(f"\x00http://{here}/", f"http://{here}/\r\nHost: x", f"http://example.com\r\n@{here}/", f"http://{here}/ x"),
        # Other schemes and odd ports.
        *(f"ftp://{here}/", f"gopher://{here}/_x", f"file://{here}/etc/passwd", f"dict://{here}/", f"unix:{here}"),
        *(f"ws://{here}/", f"httpſ://{here}/", f"http+unix://{here}/", f"javascript://{here}/", f"data:,{here}"),
        *("http://127.0.0.1:0/", f"http://127.0.0.1:{port + 65_536}/", f"http://127.0.0.1:0{port}/"),
        *(f"http://127.0.0.1:+{port}/", f"http://127.0.0.1:{port}:80/", f"http://127.0.0.1:{port}a/"),
        f"https://{here}/",
        f"HTTP://{here}/",
    ]
    assert len(set(urls)) == len(urls) >= 100
    return urls
