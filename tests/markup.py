"""What tests ask of a page's HTML: balanced, unique ids, links that lead somewhere, no network."""

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "hr", "link"}
DRAWN = {"path", "circle", "rect"}  # SVG elements that the templates close themselves
INLINE = {"span", "small", "strong", "a", "label", "button", "title", "h1", "h2", "p", "b", "i"}
BLOCK = {"div", "p", "table", "ul", "ol", "section", "figure", "details", "dl", "pre", "template"}


class Markup(HTMLParser):
    """Parses strictly; `faults` lists what a browser would have had to repair."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.refers: set[str] = set()
        self.addresses: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]
        self.faults += [f"id {i!r} twice" for i in set(self.ids) if self.ids.count(i) > 1]
        self.faults += [f"{r!r} leads nowhere" for r in self.refers if r not in self.ids]

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if len(values) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag in BLOCK and set(self.open) & (INLINE - {"i"}) - {"label"}:
            self.faults.append(f"<{tag}> inside {self.open[-1]}")
        self._collect(tag, values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if tag not in DRAWN:
            self.faults.append(f"<{tag}/> closes itself")
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes what is not open at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def _collect(self, tag, values):
        if "id" in values:
            self.ids.append(values["id"])
        self.refers |= set((values.get("aria-labelledby") or "").split())
        self.refers |= {values["data-drawer"]} if "data-drawer" in values else set()
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            if values.get(name):
                self.addresses.append(values[name])
        if (values.get("href") or "").startswith("#"):
            self.refers.add(values["href"][1:])
        if tag == "img" and not values.get("alt"):
            self.faults.append("an image without alternative text")
        if [name for name in values if name.startswith("on")]:
            self.faults.append(f"<{tag}> has a script in an attribute: {values}")
