"""Names of modules as they are seen from an activation: the same in a model and in a part of it."""


def seen_from(site: str, name: str) -> str:
    """Return the name of a module, or of what it holds, as it is seen from an activation: a dot for each level up.

    Example:
        >>> seen_from("layer1.0.relu", "layer1.0.conv.weight"), seen_from("layer1.0.relu", "layer1.1.conv")
        ('.conv.weight', '..1.conv')
    """
    here, there = site.split("."), name.split(".")
    common = 0
    while common < min(len(here) - 1, len(there) - 1) and here[common] == there[common]:
        common += 1
    return "." * (len(here) - common) + ".".join(there[common:])


def resolved(site: str, name: str) -> str:
    """Undo :func:`seen_from`; a name with dots in front is left of one that lies outside of the model.

    Example:
        >>> resolved("0.relu", ".conv.weight"), resolved("0.relu", "..1.conv"), resolved("relu", "..1.conv")
        ('0.conv.weight', '1.conv', '.1.conv')
    """
    rest = name.lstrip(".")
    path, levels = site.split("."), len(name) - len(rest)
    return "." * max(levels - len(path), 0) + ".".join([*path[: max(len(path) - levels, 0)], rest])
