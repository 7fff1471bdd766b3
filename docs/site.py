"""Says which pages the site has. MkDocs calls the functions whose names begin with `on_`.

Pages keep their places in the repository (`nbs/22_evaluate.ipynb`), so that their links to each other hold here too.
A file or folder that a page links to and that is no page becomes one under `source/`. In the end every link, image and
anchor of every built page is looked up."""

import hashlib, json, posixpath, re, shutil, tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from mkdocs.structure.toc import get_toc

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {  # in the order of the menu
    "Start": "README.md",
    "Training": "TRAINING.md",
    "Data": "DATA.md",
    "Evaluation": "EVALUATION.md",
    "Studies": "studies/README.md",
    "Study: rationales": "studies/rationales/README.md",
}
PROJECT = {
    "Contributing": "CONTRIBUTING.md",
    "Changes": "CHANGELOG.md",
    "Findings": "runs/LOG.md",
    "The folder data/": "data/README.md",
}
LINK = re.compile(r"(?<!\\)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


# ---------------------------------------------------------------- which pages there are


def rooms():
    "(heading, [room]) for each group of rooms in README, and all rooms that README names in no group."
    left = {p.stem: p for p in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))}
    groups, heading = [], "Rooms"
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if head := re.fullmatch(r"\*\*(.+)\*\*", line):
            heading = head[1]
        if (room := re.match(r"- \[`(\d\d_\w+)`\]", line)) and room[1] in left:
            if not groups or groups[-1][0] != heading:
                groups.append((heading, []))
            groups[-1][1].append(room[1])
            del left[room[1]]
    return groups + [("More rooms", list(left))] * bool(left)


def first_words(notebook):
    "Title and summary of a notebook, from its first cell."
    cell = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    found = re.match(r"# (.+)\n\n((?:> .*\n?)+)", cell)
    return found[1], " ".join(line.removeprefix("> ") for line in found[2].splitlines())


def notebooks():
    "Every notebook of the site, as paths in the repository: those of nbs/ and the executed ones of committed records."
    return [*sorted(ROOT.glob("nbs/[!_]*.ipynb")), *sorted(ROOT.glob("runs/cpu_demo/*/train.ipynb"))]


def on_config(config):
    unnumbered = [f"nbs/{n}.ipynb" for n in ("tour", "train", "explore", "compare", "study")]
    config.nav = [
        *({name: page} for name, page in TEXTS.items()),
        {"Notebooks": [*unnumbered, *({head: [f"nbs/{r}.ipynb" for r in names]} for head, names in rooms())]},
        {
            "Reference": [
                "api/index.md",
                *({head: [f"api/{r[3:]}.md" for r in names]} for head, names in rooms()),
            ]
        },
        {"Project": [{name: page} for name, page in PROJECT.items()]},
    ]
    config.watch += [str(ROOT / name) for name in ("nbs", "nli_ft", *TEXTS.values(), *PROJECT.values())]
    return config


def reference(room):
    "The page of one room. mkdocstrings fills it from the exported module."
    title, _ = first_words(ROOT / "nbs" / f"{room}.ipynb")
    note = f"Defined and shown with examples in the notebook [{room}](../nbs/{room}.ipynb)."
    module = f"nli_ft.{room[3:]}"
    head = f"---\ntitle: {room[3:]}\n---\n\n# {title}\n\n"
    return f"{head}`{module}`. {note}\n\n::: {module}\n"  # the summary is the module's docstring


def reference_index():
    lines = ["# Reference", "", "Every public function and class, by the notebook that defines it.", ""]
    for head, names in rooms():
        lines += [f"## {head}", ""]
        for room in names:
            lines.append(
                f"- [`nli_ft.{room[3:]}`]({room[3:]}.md): {first_words(ROOT / 'nbs' / f'{room}.ipynb')[1]}"
            )
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------- pages from files


def visible(cell):
    "A cell without the lines that only nbdev reads. None for a cell that is hidden from readers."
    source = "".join(cell["source"])
    if re.match(r"#\| ?(hide|default_exp)\b", source) or "nbdev_export()" in source:
        return None
    return cell | {"source": re.sub(r"^#\| ?\w+.*\n?", "", source, flags=re.M)}


def readable(notebook, resolve):
    "The text of a notebook as the site shows it. `resolve` turns its links into links of the site."
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    nb["cells"] = [c for c in map(visible, nb["cells"]) if c is not None]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = LINK.sub(resolve, cell["source"])
    return json.dumps(nb, ensure_ascii=False)


def fenced(path):
    mark = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml"}.get(path.suffix, "text")
    return f"~~~~~~{mark}\n{path.read_text(encoding='utf-8')}\n~~~~~~\n"


def shown(path):
    "A page that shows a file, or what lies in a folder."
    name = path.relative_to(ROOT).as_posix()
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
    if path.is_file():
        return head + fenced(path)
    inside = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return head + "\n".join(
        f"## {p.relative_to(path).as_posix()}\n\n{fenced(p) if p.suffix == '.py' else ''}" for p in inside
    )


class Site:
    "What the pages link to, while the list of files is made."

    def __init__(self, config):
        self.config, self.pages, self.extra = config, set(), {}

    def target(self, page, link):
        "The place in the site of what a page of the repository links to."
        name = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(link)))
        path = ROOT / name
        if name.startswith("..") or not path.exists():
            raise PluginError(f"{page}: the link {link} leads to no file of this project")
        if name in self.pages or path.suffix == ".png":
            return name
        self.extra[name] = path
        return f"source/{name}{'.md' if path.is_file() else '/index.md'}"

    def resolve(self, page, ending=None):
        "A function for `LINK.sub`. A notebook's links are not rewritten by MkDocs: `ending` is what pages end in."

        def replace(match):
            name = self.target(page, match[1])
            if ending and name.endswith((".md", ".ipynb")):
                name = re.sub(r"(^|/)README$", r"\1index", name.rpartition(".")[0]) + ending
            return f"]({posixpath.relpath(name, posixpath.dirname(page) or '.')}{match[2] or ''})"

        return replace


def without_badges(text):
    "A document without the pictures of its badges, which would be loaded from a network. Their links stay."
    return re.sub(r"\[!\[([^]]*)\]\(https:[^)]*\)\]", r"[\1]", text)


def names_of(paths):
    return [p.relative_to(ROOT).as_posix() for p in paths]


@event_priority(50)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    site, texts = Site(config), [*TEXTS.values(), *PROJECT.values()]
    site.pages = {*texts, *names_of(notebooks())}
    for name in texts:
        text = without_badges((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=LINK.sub(site.resolve(name), text)))
    cells = Path(tempfile.mkdtemp(prefix="nli_ft_site_"))
    config.extra["copies"] = str(cells)
    for path in notebooks():
        name = path.relative_to(ROOT).as_posix()
        (cells / name).parent.mkdir(parents=True, exist_ok=True)
        (cells / name).write_text(readable(path, site.resolve(name, ".html")), encoding="utf-8")
        files.append(File(name, str(cells), config.site_dir, config.use_directory_urls))
    for picture in sorted(ROOT.glob("runs/cpu_demo/*/*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for _, names in rooms():
        for room in names:
            files.append(File.generated(config, f"api/{room[3:]}.md", content=reference(room)))
    files.append(File.generated(config, "api/index.md", content=reference_index()))
    for name, path in sorted(site.extra.items()):
        page = f"source/{name}{'.md' if path.is_file() else '/index.md'}"
        files.append(File.generated(config, page, content=shown(path)))
    return files


@event_priority(-50)  # after mkdocs-jupyter has made the page
def on_page_content(html, page, config, files):
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html, headings = with_anchors(html)
    page.toc = get_toc(headings)
    return with_shared_style(html, page.url, Path(config.site_dir))


def with_anchors(html):
    """The page of a notebook with an id of its own for each heading, and these headings as a tree.

    mkdocs-jupyter makes its menu from another text than the page, and the ids of the two differ."""
    tree, above, taken = [], [], {}

    def heading(match):
        level, name, title = int(match[1]), match[2] or "part", re.sub(r"<[^>]+>|¶", "", match[3]).strip()
        taken[name] = taken.get(name, 0) + 1
        anchor = name if taken[name] == 1 else f"{name}-{taken[name]}"
        while above and above[-1]["level"] >= level:
            above.pop()
        entry = dict(level=level, id=anchor, name=title, html=title, data_toc_label="", children=[])
        (above[-1]["children"] if above else tree).append(entry)
        above.append(entry)
        inner = match[3].replace(f'href="#{match[2]}"', f'href="#{anchor}"')
        return f'<h{level} id="{anchor}">{inner}</h{level}>'

    return re.sub(r'<h([1-6]) id="([^"]*)">(.*?)</h\1>', heading, html, flags=re.S), tree


def with_shared_style(html, url, site):
    "The page with one shared copy of the half megabyte of style that mkdocs-jupyter writes into every notebook's page."

    def shared(match):
        name = f"assets/notebook-{hashlib.sha256(match[1].encode()).hexdigest()[:8]}.css"
        if not (site / name).exists():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(match[1], encoding="utf-8")
        return f'<link rel="stylesheet" href="{posixpath.relpath(name, posixpath.dirname(url) or ".")}">'

    return re.sub(r"<style[^>]*>([^<]{20000,})</style>", shared, html)


# ---------------------------------------------------------------- every link of every built page


class Links(HTMLParser):
    "What a page links to, what it loads, and the anchors that it has."

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect"):
            self.loads.append(given["href"])
        if tag in ("img", "script", "iframe") and given.get("src"):
            self.loads.append(given["src"])


def faults(site):
    "What is wrong with the links of a built site: one line for each."
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    found = []
    for page, has in pages.items():
        for link in [*has.links, *has.loads]:
            url, name = urlsplit(link), page.relative_to(site).as_posix()
            if url.scheme in ("http", "https"):
                if link in has.loads:
                    found.append(f"{name}: loads {link} from a network")
                continue
            if url.scheme:
                continue
            start = site if url.path.startswith("/") else page.parent  # 404.html is shown for any address
            target = (start / unquote(url.path).lstrip("/")).resolve() if url.path else page
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                found.append(f"{name}: nothing is at {link}")
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f"{name}: {link} names an anchor that is not there")
    return found


def on_post_build(config):
    shutil.rmtree(config.extra["copies"], ignore_errors=True)
    if broken := faults(Path(config.site_dir)):
        raise PluginError("\n".join([f"{len(broken)} broken links:", *broken[:40]]))
