"Replace a function in every room that has imported it."

import importlib, sys


def swap(
    monkeypatch, target: str, value
):  # pytest's monkeypatch. `name` is "nli_ft.room.name", or a name that one room has
    "A name that is imported by `from room import name` is looked up in each importer, so all of them get `value`."
    room, _, name = target.rpartition(".")
    if room:
        importlib.import_module(room)
    rooms = [
        m
        for n, m in sys.modules.items()
        if (n == room or not room and n.startswith("nli_ft.")) and name in vars(m)
    ]
    assert rooms, f"no room that is imported here has {target}"
    old = getattr(rooms[0], name)
    assert all(vars(m)[name] is old for m in rooms), f"{target} is not one thing: name its room, too"
    for module in [m for n, m in sys.modules.items() if n.startswith("nli_ft.")]:
        if name in vars(module) and vars(module)[name] is old:
            monkeypatch.setattr(module, name, value)
