"""A report page in headless Chromium: megabytes, seconds until it is there (the browser's own start
subtracted), console messages, network requests. `report_page.py STUDY/report/index.html`
"""

import argparse, re, shutil, statistics, subprocess, tempfile, time
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
]

OWN = r"https?://([\w-]+\.)*(google|googleapis)\.com/"  # the browser's own services, not the page's


def browser():
    "Chromium or Chrome, wherever it is called so."
    return next(
        (
            p
            for n in ("chromium", "chromium-browser", "google-chrome", "chrome")
            if (p := shutil.which(n))
        ),
        None,
    )


def visit(page, url=None):
    "Open a page once: seconds, console lines, addresses asked over the network."
    with tempfile.TemporaryDirectory() as home:
        log, start = Path(home) / "net.json", time.perf_counter()
        done = subprocess.run(
            [
                browser(),
                *FLAGS,
                f"--user-data-dir={home}",
                f"--log-net-log={log}",
                "--dump-dom",
                url or Path(page).resolve().as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        took = time.perf_counter() - start
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    asked = sorted(
        u for u in set(re.findall(r'"url":"(https?://[^"]+)"', text)) if not re.match(OWN, u)
    )
    return (
        took,
        [line for line in done.stderr.splitlines() if "CONSOLE" in line],
        asked,
        done.stdout,
    )


def main():
    arg = argparse.ArgumentParser(description=__doc__)
    arg.add_argument("page")
    arg = arg.parse_args()
    blank = statistics.median(visit(None, "about:blank")[0] for _ in range(3))
    runs = [visit(arg.page) for _ in range(3)]
    print(
        f"{Path(arg.page).stat().st_size / 1e6:.2f} MB, "
        f"{statistics.median(r[0] for r in runs) - blank:.2f} s (browser alone {blank:.2f} s), "
        f"console {runs[0][1]}, network {runs[0][2]}"
    )


if __name__ == "__main__":
    main()
