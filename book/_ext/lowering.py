"""MyST text of the book as plain Markdown: what `notebooks.py` puts into text cells."""

import ast
import re
import textwrap

OPENING = re.compile(r"^(?P<fence>:{3,}|`{3,})(?:\{(?P<name>[\w:-]+)\})?[ ]*(?P<argument>.*)$")
ROLE = re.compile(r"\{([\w:-]+)\}`([^`]+)`")


def lower(text, book, page):
    """`text` of the page in plain Markdown."""
    out, prose, lines = [], [], text.split("\n")
    while lines:
        line = lines.pop(0)
        opening = OPENING.match(line)
        if opening or line.startswith("$$"):
            out.append(_inline("\n".join(prose), book, page))
            prose = []
        if opening:
            body = _until_closing(lines, opening["fence"], page)
            out.append(_block(opening, body, book, page))
        elif line.startswith("$$"):
            out.append(_equation(line, lines, book))
        elif not re.match(r"\([\w-]+\)=$|%( |$)", line):  # neither a label nor a comment
            prose.append(line)
    out.append(_inline("\n".join(prose), book, page))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def _until_closing(lines, fence, page):
    body = []
    while lines:
        line = lines.pop(0)
        if line.rstrip() == fence:
            return body
        body.append(line)
    raise ValueError(f"{page}.md: a block that opens with {fence} has no end in its cell")


def _block(opening, body, book, page):
    name, argument = opening["name"], opening["argument"].strip()
    if not name:
        fence = opening["fence"]
        return "\n".join([f"{fence}{argument}", *body, fence])
    options = {}
    while body and (option := re.match(r":([\w-]+):\s*(.*)$", body[0])):
        options[option[1]] = option[2]
        body.pop(0)
    if name not in DIRECTIVES:
        raise ValueError(f"{page}.md: lowering.py has no plain form of the directive {name}")
    return "\n" + DIRECTIVES[name](argument, options, "\n".join(body), book, page) + "\n"


def _equation(line, lines, book):
    """Display math with its number; inline roles do not occur in it."""
    block = [line]
    while not (len(block) > 1 and line.startswith("$$")) and not re.match(r"\$\$.+\$\$", line):
        line = lines.pop(0)
        block.append(line)
    label = re.match(r"\$\$ \(([\w:-]+)\)", line)
    if label:
        block[-1:] = [rf"\tag{{{book.target(label[1]).number}}}", "$$"]
    return "\n".join(block)


def _quote(argument, options, body, book, page):
    text = [f"**{_inline(argument, book, page)}**", "", *lower(body, book, page).split("\n")]
    return "\n".join(f"> {line}".rstrip() for line in text)


def _folded(summary, body, book, page):
    return f"<details><summary>{summary}</summary>\n\n{lower(body, book, page)}\n\n</details>"


def _solution(argument, options, body, book, page):
    return _folded(f"Solution to {book.target(argument).text}", body, book, page)


def _solution_start(argument, options, body, book, page):
    return f"### Solution to {book.target(argument).text}\n\n{lower(body, book, page)}"


def _exercise(argument, options, body, book, page):
    name = book.target(options["label"]).text
    title = f" ({_inline(argument, book, page)})" if argument else ""
    return f"**{name}{title}.** {lower(body, book, page)}"


def _figure(argument, options, body, book, page):
    number = book.target(options["name"]).text
    return f"![{options['alt']}]({argument})\n\n*{number}.* {lower(body, book, page)}"


def _table(argument, options, body, book, page):
    number = book.target(options["name"]).text
    return f"*{number}.* {_inline(argument, book, page)}\n\n{lower(body, book, page)}"


def shown_code(path, options):
    """The lines of a file that a `literalinclude` shows."""
    text = path.read_text(encoding="utf-8")
    if "pyobject" not in options:
        return text.rstrip()
    body = ast.parse(text).body
    for name in options["pyobject"].split("."):
        node = next(node for node in body if getattr(node, "name", None) == name)
        body = node.body
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(text.split("\n")[first - 1 : node.end_lineno]))


def _literalinclude(argument, options, body, book, page):
    unknown = set(options) - {"pyobject", "language", "caption", "name"}
    if unknown:
        raise ValueError(f"{page}.md: lowering.py cannot do literalinclude with {unknown}")
    path = (book.root / "book" / argument).resolve()
    place = f"`{path.relative_to(book.root.resolve())}`"
    language = options.get("language", "python" if path.suffix == ".py" else path.suffix[1:])
    return f"From {place}:\n\n```{language}\n{shown_code(path, options)}\n```"


def _nothing(argument, options, body, book, page):
    return ""


# A directive that the book does not use yet has no plain form, and is refused by name.
DIRECTIVES = {
    "admonition": _quote,
    "exercise": _exercise,
    "solution": _solution,
    "solution-start": _solution_start,
    "solution-end": _nothing,
    "figure": _figure,
    "table": _table,
    "literalinclude": _literalinclude,
}


def _inline(text, book, page):
    """Prose with its roles and its links to labels resolved."""
    text = ROLE.sub(lambda role: _role(role[1], role[2], book, page), text)
    return re.sub(
        r"\]\(([\w-]+)\)",
        lambda link: f"]({book.target(link[1]).url})" if link[1] in book.targets else link[0],
        text,
    )


def _role(name, content, book, page):
    titled = re.fullmatch(r"(.+?)\s*<(.+)>", content, re.DOTALL)
    text, key = (titled[1], titled[2]) if titled else (None, content)
    if name.startswith("cite"):
        return _citation(name, key, book)
    if name in ("ref", "numref", "eq"):
        target = book.target(key)
        if text and name == "numref":
            text = text.replace("%s", target.number).replace("{number}", target.number)
        return f"[{text or target.text}]({target.url})"
    if name == "doc":
        return f"[{text or book.titles[key]}]({book.site}/book/{key}.html)"
    if name == "term":
        anchor = re.sub(r"[^a-zA-Z0-9]+", "-", key).strip("-")
        return f"[{text or key}]({book.site}/book/glossary.html#term-{anchor})"
    if name in ("mod", "class", "func", "meth", "attr", "data", "exc", "obj"):
        shown = key.rpartition(".")[2] if key.startswith("~") else key
        return f"`{text or shown}`"
    if name.startswith("glue"):
        return f"`{key.partition(':')[0]}`"
    raise ValueError(f"{page}.md: lowering.py has no plain form of the role {name}")


def _citation(name, keys, book):
    url = f"{book.site}/book/bibliography.html"
    works = [book.works[key.strip()] for key in keys.split(",")]
    if name == "cite:t":
        return ", ".join(f"[{who} ({year})]({url})" for who, year in works)
    return "(" + "; ".join(f"[{who}, {year}]({url})" for who, year in works) + ")"
