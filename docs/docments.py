"""Shows what this package writes beside its code: a comment behind a parameter, a field or `->`, and a method that
`@patch` adds to a class. griffe, which mkdocstrings reads code with, knows none of them by itself."""

import ast, io, tokenize

import griffe


def _comments(source):
    "Line number -> comment, for a piece of Python."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT}


def _notes(source):
    """Parameter (or `return`) -> comment, for the source of a function.

    The rule is that of `fastcore.docments`, which only reads functions that are imported: the comment stands on the
    line of the parameter, or else on the lines directly above it."""
    body, comments = ast.parse(source).body, _comments(source)
    if not body or not hasattr(body[0], "args"):
        return {}  # the `__init__` of a dataclass stands in no source
    defined, args = body[0], body[0].args
    places = {a.lineno: a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
    places |= {a.lineno: a.arg for a in (args.vararg, args.kwarg) if a}
    if defined.returns:
        places[defined.returns.lineno] = "return"
    notes = {}
    for line, name in places.items():
        lines = [line] if line in comments else []
        above = line - 1
        while line not in comments and above in comments and above not in places:
            lines.insert(0, above)
            above -= 1
        notes[name] = " ".join(comments[number] for number in lines)
    return notes


def _google(func):
    "The docstring of a function, with Google-style sections for parameters and result."
    notes, text = _notes(func.source), func.docstring.value if func.docstring else ""
    named = [(p.name, notes.get(p.name.lstrip("*"))) for p in func.parameters]
    lines = [f"    {name}: {note}" for name, note in named if note]
    sections = ["Args:\n" + "\n".join(lines)] * bool(lines)
    if notes.get("return"):
        sections.append(f"Returns:\n    {notes['return']}")
    return "\n\n".join([*[text] * bool(text), *sections])


def _describe(obj, text, loader):
    "Give an object this docstring, read in the style that its loader reads all of them in."
    if text:
        style = dict(parser=loader.docstring_parser, parser_options=loader.docstring_options)
        obj.docstring = griffe.Docstring(text, parent=obj, lineno=obj.lineno, endlineno=obj.lineno, **style)


def _describe_fields(cls, loader):
    "Comments behind the fields of a class become their descriptions."
    comments = _comments(cls.source)
    for attribute in cls.attributes.values():
        if not attribute.docstring and attribute.lineno and not attribute.inherited:
            first = attribute.lineno - cls.lineno + 1
            last = (attribute.endlineno or attribute.lineno) - cls.lineno + 1
            _describe(
                attribute, " ".join(text for line, text in comments.items() if first <= line <= last), loader
            )


def _is_patch(func):
    return any(str(d.value) == "patch" for d in func.decorators)


class Docments(griffe.Extension):
    "The griffe extension that mkdocs.yml names."

    def on_function(self, *, func, loader, **kwargs):
        _describe(func, _google(func), loader)

    def on_class(self, *, cls, loader, **kwargs):
        _describe_fields(cls, loader)

    def on_module_members(self, *, node, mod, **kwargs):
        "Put each `@patch` function into the class that its first parameter names, where the class is in this module."
        if isinstance(node, ast.AST):
            for func in [f for f in mod.functions.values() if _is_patch(f) and f.parameters]:
                owner = mod.classes.get(str(func.parameters[0].annotation))
                if owner is not None and not owner.is_alias:
                    mod.del_member(func.name)
                    owner.set_member(func.name, func)
