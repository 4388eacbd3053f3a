"""README.md is made from nbs/index.ipynb, without Quarto and with the standard library alone.

python .ci/readme.py             write README.md and the images that it shows (nbs/index_files/)
python .ci/readme.py --check     change nothing; exit status 1 when they are out of date
python .ci/readme.py --command "Run the tests"     print the first shell block under that heading of README.md
"""

import base64, json, posixpath, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = "nbs/index_files"


def from_root(text):
    "Markdown written for nbs/, with its relative links made relative to the project's root."

    def link(m):
        target = m[1]
        return (
            m[0] if re.match(r"[a-z]+:|#", target) else f"]({posixpath.normpath(f'nbs/{target}')})"
        )

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def fenced(text, language=""):
    return f"```{language}\n{text.strip(chr(10))}\n```"


def show(output, name, images):
    "One stored output as markdown; a picture goes to `images`."
    data = output.get("data", {"text/plain": output.get("text", "")})
    for kind in ("gif", "png"):
        if f"image/{kind}" in data:
            path = f"{IMAGES}/{name}.{kind}"
            images[path] = base64.b64decode("".join(data[f"image/{kind}"]))
            return f"![]({path})"
    if "text/markdown" in data:
        return from_root("".join(data["text/markdown"]))
    return fenced("".join(data["text/plain"]))


def convert(nb):
    "`(markdown, {path: image bytes})` of a notebook; `#| hide` hides cells, `#| echo: false` code."
    parts, images = (
        ["<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that notebook, not this file. -->"],
        {},
    )
    for cell in nb["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown":
            parts.append(from_root("\n".join(lines)))
        elif "#| hide" not in lines:
            code = "\n".join(line for line in lines if not line.startswith("#|"))
            parts += [] if "#| echo: false" in lines else [fenced(code, "python")]
            parts += [show(o, f"{cell['id']}-{i}", images) for i, o in enumerate(cell["outputs"])]
    return "\n\n".join(p.strip() for p in parts if p.strip()) + "\n", images


def command(heading):
    "The first shell block under a heading of README.md."
    text = "\n" + (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(r"^```(?:bash|sh)\n(.*?)\n```", section, re.M | re.S)
    if not found:
        sys.exit(f"README.md has no shell block under the heading {heading!r}.")
    return found[1]


def stale(wanted):
    "The files of `wanted` (path -> bytes) that differ on disk, and pictures that are no longer shown."
    old = {p.relative_to(ROOT).as_posix() for p in (ROOT / IMAGES).iterdir()} - set(wanted)
    return sorted(old) + [
        p for p, b in wanted.items() if not (ROOT / p).is_file() or (ROOT / p).read_bytes() != b
    ]


def main(args):
    if args[:1] == ["--command"] and len(args) == 2:
        return print(command(args[1]))
    if args not in ([], ["--check"]):
        sys.exit(__doc__)
    text, images = convert(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    wanted = {"README.md": text.encode(), **images}
    changed = stale(wanted)
    if args and changed:
        sys.exit(f"Out of date: {', '.join(changed)}.\nRun: python .ci/readme.py")
    for path in changed:
        (ROOT / path).parent.mkdir(exist_ok=True)
        if path in wanted:
            (ROOT / path).write_bytes(wanted[path])
        else:
            (ROOT / path).unlink()
    print(f"README.md: {'up to date' if not changed else 'wrote ' + ', '.join(changed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
