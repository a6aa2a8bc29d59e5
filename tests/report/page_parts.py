"""Parse a page into its parts with the standard library."""

from collections import defaultdict
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """The tables, samples and texts of a page, by section."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.tables = defaultdict(list)  # name -> rows of cells of lines
        self.sections = defaultdict(str)
        self.samples = []  # (classes, [prompt, response, ...], [line about each response, ...])
        self.pres, self.titles, self.tiles = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, known))
        if tag == "tr" and (name := self._inside("data-table")):
            self.tables[name].append([])
        if tag in ("th", "td"):
            self.tables[self._inside("data-table")][-1].append([])
        if tag == "article":
            self.samples.append((known["class"].split(), [], []))
        if tag == "pre":
            self.pres.append("")
            if self._inside("class", "article"):
                self.samples[-1][1].append("")
        if tag == "p" and known.get("class") == "label" and self._inside("class", "article"):
            self.samples[-1][2].append([])
        if "tile" in known.get("class", "").split():
            self.tiles.append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        if not self.open:
            return
        tag, known = self.open[-1]
        self.sections[next((of["id"] for name, of in self.open if name == "section"), "head")] += data
        if tag == "pre":
            self.pres[-1] += data
            if self._inside("class", "article"):
                self.samples[-1][1][-1] += data
        elif not data.strip():
            return
        elif tag in ("span", "small") and self._inside("data-table") or tag == "th" and self._inside("data-table"):
            self.tables[self._inside("data-table")][-1][-1].append(data)
        elif self._inside("class", "p") == "label" and self._inside("class", "article"):
            self.samples[-1][2][-1].append(data)
        elif tag == "b" and any(name == "figcaption" for name, _ in self.open):
            self.titles.append(data)
        elif any(of.get("class") == "tile" for _, of in self.open):
            self.tiles[-1].append(data)

    def _inside(self, attribute, tag=None):
        found = [of[attribute] for name, of in self.open if attribute in of and tag in (None, name)]
        return found[-1] if found else None

    def column(self, table, title):
        """Return the cells of a column by the first cell of their row."""
        head, *rows = self.tables[table]
        place = [cell[0] for cell in head].index(title)
        return {tuple(row[0][:1]): row[place] for row in rows} if rows else {}
