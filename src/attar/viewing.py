"""`attar view`: a report in a browser, whose slider solves again and makes other sizes.

For one reader on this machine: it listens on 127.0.0.1, answers only to that name, and does nothing
that changes anything unless the page's own token is shown, which other sites cannot read.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import TemplateError

from attar import protecting
from attar.errors import AttarError, PlanError, SettingError
from attar.export import FUSED_ROLES
from attar.making import Making
from attar.plan.candidates import pinned
from attar.plan.choose import choose
from attar.plan.frontier import FRONTIER_FILE, read_prices
from attar.plan.fuse import fuse_protected, groups_of
from attar.plan.size import check_fits, parse_size
from attar.plan.solve import smallest, solve, weight_bytes
from attar.records import Budget, Candidate, Cut, FrontierPoint, Protected, Recipe, Unit, Units
from attar.report.html import page_text
from attar.report.record import FORMAT_VERSION, treatment_label
from attar.report.sizes import (
    Treatments,
    point_to_json,
    show_point,
    show_treatment,
    typed_size,
)
from attar.transform.apply import build_transform

HOST = "127.0.0.1"
# A name for each of ten thousand units is less.
MOST_BODY_BYTES = 1 << 20
MOST_SIZE_LETTERS = 40
# Files of a report that are handed out, with what they are.
FILES = {
    "report.json": "application/json",
    "plan.yaml": "text/plain",
    FRONTIER_FILE: "application/json",
}
PATH = re.compile(r"/(?:made/([0-9]{1,6})/)?([a-z.]*)")
_HINT = "name a folder that attar compress wrote, or one of attar audit --report."


@dataclass(frozen=True)
class Shown:
    """One report, with the prices its model was made from.

    Attributes:
        folder: Of the model.
        report: Where report.json lies.
        recipe: That the prices were made with; None where there are none.
    """

    folder: Path
    report: Path
    facts: Mapping[str, Any]
    units: Units
    candidates: Mapping[str, Sequence[Candidate]]
    recipe: Recipe | None


def open_report(folder: Path) -> Shown:
    """Read a report and its prices.

    Raises:
        PlanError: There is none, or it cannot be read.
    """
    report = folder / "report" if (folder / "report" / "report.json").exists() else folder
    try:
        facts = json.loads((report / "report.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{folder} holds no report.", hint=_HINT) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{report / 'report.json'} is not readable JSON.", hint=_HINT) from error
    if not isinstance(facts, dict) or facts.get("format_version") != FORMAT_VERSION:
        raise PlanError(f"{report / 'report.json'} is not a report of this version.", hint=_HINT)
    try:
        facts.setdefault("frontier", None)  # written before there was one
        facts["size"]["folder"] = str(report.parent if report.name == "report" else folder)
        units = Units(tuple(_unit(line) for line in facts["units"]), ())
        recipes: list[Recipe] = []

        def units_of(recipe: Recipe, _cuts: Sequence[Cut]) -> Units:
            recipes.append(recipe)
            return units

        candidates: Mapping[str, Sequence[Candidate]] = {}
        if facts["frontier"] is not None and (report / FRONTIER_FILE).exists():
            candidates, *_ = read_prices(report / FRONTIER_FILE, units_of, build_transform)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{report / 'report.json'} lacks {error}.", hint=_HINT) from error
    recipe = recipes[0] if recipes else None
    return Shown(Path(facts["size"]["folder"]), report, facts, units, candidates, recipe)


def _unit(line: Mapping[str, Any]) -> Unit:
    left = line.get("left") or line  # what a cut left, which prices are of
    return Unit(
        line["name"],
        line["kind"],
        tuple(left["shape"]),
        (line["kind"],),
        left["groups"],
        left["macs"],
        tuple(line["coupled"]),
    )


def page_of(shown: Shown, token: str) -> bytes:
    """The page, with the token that lets it ask for more.

    Raises:
        PlanError: The record lacks what a page needs.
    """
    try:
        return page_text(dict(shown.facts), token, str(shown.report)).encode()
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{shown.report / 'report.json'} lacks {error}.", hint=_HINT) from error


def solve_again(
    shown: Shown, size: str, keep: Sequence[str], protect: Sequence[str] = ()
) -> dict[str, Any]:
    """The best plan of another size, as the page shows it; no weight is touched.

    Protected slices that the report has no worths for wait until a model is made.

    Raises:
        AttarError: The size cannot be read or had, or a pin names no unit.
    """
    sizes, recipe = shown.facts["frontier"], shown.recipe
    if recipe is None or recipe.decide != "price":
        raise PlanError(
            "this report has no prices that another size can be solved from.",
            hint="compress the model again, with --decide price.",
        )
    budget = Budget(_size_bytes(shown, size), (*recipe.keep, *keep))
    candidates = pinned(shown.candidates, shown.units, keep)
    groups = groups_of(list(candidates), FUSED_ROLES[recipe.to])
    spared = fuse_protected(_protected(shown, replace(recipe, protect=tuple(protect))), groups)
    overhead = int(sizes["overhead_bytes"])
    check_fits(overhead + weight_bytes(smallest(candidates)), budget)
    choices = choose(
        candidates,
        budget.weight_bytes - overhead,
        units=shown.units,
        groups=groups,
        build=build_transform,
        decide=partial(solve, protected=spared),
    )
    found = _as_near(sizes["points"], choices, overhead)
    table = Treatments(treatment_label, {unit.name: unit.n_weights for unit in shown.units})
    point = show_point(point_to_json(found, sizes["n_parameters"], table))
    return {"point": point, "treatments": [show_treatment(row) for row in table.rows]}


def _protected(shown: Shown, recipe: Recipe) -> list[Protected]:
    """Slices with what each unit is worth there, as the report has it."""
    units = shown.facts["units"]
    everywhere = {unit["name"]: unit["worth"] or 0.0 for unit in units}
    return [
        Protected(label, nats, {u["name"]: u["slices"][label] for u in units}, everywhere)
        for label, nats in protecting.asked(recipe)
        if all(label in unit["slices"] for unit in units)
    ]


def _as_near(
    points: Sequence[Mapping[str, Any]], choices: Mapping[str, Candidate], overhead: int
) -> FrontierPoint:
    """A point that is corrected as the nearest one that was solved from the same prices."""
    size = overhead + weight_bytes(choices)
    predicted = sum(c.predicted_damage or 0.0 for c in choices.values())
    solved = [point for point in points if not point["is_made"]]
    near = min(solved, key=lambda point: abs(point["bytes"] - size))
    ratio = near["corrected_damage"] / near["predicted_damage"] if near["predicted_damage"] else 1.0
    return FrontierPoint(
        size, predicted, predicted * ratio, None, bool(near["is_sure"]), choices=choices
    )


def _size_bytes(shown: Shown, size: str) -> int:
    return parse_size(
        size,
        bytes_at_16_bits=shown.facts["size"]["bytes_before"],
        n_parameters=shown.facts["frontier"]["n_parameters"],
    )


class Viewer(ThreadingHTTPServer):
    """Answers a browser until it is closed; making a model is left to another process."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int, options: Sequence[str] = ()) -> None:
        self.token = secrets.token_urlsafe(24)
        self.shown = [open_report(folder)]
        self.pages = [page_of(self.shown[0], self.token)]
        self.making = Making()
        self._lock = Lock()
        self.options = tuple(options)
        try:
            super().__init__((HOST, port), Answer)
        except (OSError, OverflowError) as error:
            busy = getattr(error, "errno", None) == errno.EADDRINUSE
            raise SettingError(
                f"port {port} {'is in use' if busy else f'cannot be opened: {error}'}.",
                hint="choose another, as in --port 8770; --port 0 takes any that is free.",
            ) from error

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def server_close(self) -> None:
        """Stop, and what is being made too."""
        self.making.stop()
        super().server_close()

    def make(
        self, shown: Shown, size: str, keep: Sequence[str], protect: Sequence[str]
    ) -> dict[str, Any]:
        """Begin to make a size in a new folder beside that of the report."""
        if shown.facts["frontier"]["options"] is None:
            raise PlanError(
                "the model or its data was given from Python, and cannot be opened again.",
                hint="call attar.compress there, with another size.",
            )
        # What cannot be had is refused now, and not in minutes.
        solve_again(shown, size, keep, protect)
        out = _new_folder(shown.folder, typed_size(_size_bytes(shown, size)))
        pins = [f"--keep={name}" for name in keep] + [f"--protect={one}" for one in protect]
        words = ["apply", str(shown.report), f"--size={size}", f"--out={out}", *pins, *self.options]
        return {"number": self.making.start(words, out)}

    def progress(self) -> dict[str, Any]:
        """How far what is being made is; a finished one gets a page."""
        now = self.making.now()
        if now["state"] == "done":
            now["page"] = self._page_of_made(Path(now["folder"]))
        return now

    def _page_of_made(self, folder: Path) -> str:
        with self._lock:
            for number, shown in enumerate(self.shown):
                if shown.folder == folder:
                    return f"/made/{number}/"
            shown = open_report(folder)
            self.pages.append(page_of(shown, self.token))
            self.shown.append(shown)
            return f"/made/{len(self.shown) - 1}/"


def _new_folder(beside: Path, size: str) -> Path:
    """A name that is not taken."""
    first = beside.with_name(f"{beside.name}-{size}")
    numbered = (first.with_name(f"{first.name}-{n}") for n in range(2, 10_000))
    return next(path for path in (first, *numbered) if not path.exists())


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Viewer
    server_version, sys_version = "attar", ""
    timeout = 30  # seconds a browser may take to say what it wants

    def log_message(self, *_words: Any) -> None:
        """Say nothing: the terminal is for what was typed."""

    def do_GET(self) -> None:
        """Hand out the page, its files, or how far the making is."""
        found = self._place()
        if found is None or not self._comes_here():
            return
        number, name = found
        if name == "":
            self._send(HTTPStatus.OK, "text/html", self.server.pages[number])
        elif name == "progress":
            self._answer(self.server.progress)
        elif name in FILES and (self.server.shown[number].report / name).is_file():
            file = self.server.shown[number].report / name
            self._send(HTTPStatus.OK, FILES[name], file.read_bytes())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page.")

    def do_POST(self) -> None:
        """Solve again, or begin to make a model; only for the page itself."""
        found = self._place()
        if found is None or not self._comes_here() or not self._is_from_the_page():
            return
        number, name = found
        asked = self._wish()
        if asked is None:
            return
        size, keep, protect = asked
        shown = self.server.shown[number]
        if name == "solve":
            self._answer(lambda: solve_again(shown, size, keep, protect))
        elif name == "apply":
            self._answer(lambda: self.server.make(shown, size, keep, protect))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing to do there.")

    def _place(self) -> tuple[int, str] | None:
        """Number of the report and what of it is wanted; None when that was refused."""
        found = PATH.fullmatch(self.path)
        number = int(found[1] or 0) if found else 0
        if found is None or number >= len(self.server.pages):
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page.")
            return None
        return number, found[2]

    def _comes_here(self) -> bool:
        """Refuse a name that was made to point at this machine (DNS rebinding)."""
        port = self.server.server_port
        if self.headers.get("Host") in (f"{HOST}:{port}", f"localhost:{port}"):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"this is {self.server.address} only.")
        return False

    def _is_from_the_page(self) -> bool:
        """Refuse what another site's page sends: it has another origin, and not the token."""
        origin, host = self.headers.get("Origin"), self.headers.get("Host")
        shown = self.headers.get("X-Attar-Token", "")
        same = secrets.compare_digest(shown.encode(), self.server.token.encode())
        if same and origin in (None, f"http://{host}"):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "only the page itself may ask; load it again.")
        return False

    def _wish(self) -> tuple[str, list[str], list[str]] | None:
        """The size, the pins and the slices that are asked for; None when that was refused."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the length is missing.")
            return None
        if len(length) > 9 or int(length) > MOST_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "that is too much.")
            return None
        try:
            asked = json.loads(self.rfile.read(int(length)))
            size, keep, protect = asked["size"], asked["keep"], asked.get("protect", [])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            size, keep, protect = None, None, None
        good = isinstance(size, str) and len(size) <= MOST_SIZE_LETTERS
        if not good or not all(map(_are_names, (keep, protect))):
            self._refuse(HTTPStatus.BAD_REQUEST, "a size and lists of names are wanted.")
            return None
        return size, keep, protect

    def _answer(self, work: Any) -> None:
        """Send what was found as JSON, or what is wrong and what to do instead."""
        try:
            facts = work()
        except AttarError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, error.problem, error.hint)
            return
        self._send(HTTPStatus.OK, "application/json", json.dumps(facts).encode())

    def _refuse(self, status: HTTPStatus, problem: str, hint: str = "") -> None:
        self._send(
            status, "application/json", json.dumps({"error": problem, "hint": hint}).encode()
        )

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        # Nothing may keep the token, frame the page, or take it for something else.
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)


def _are_names(given: Any) -> bool:
    """Whether something is a list of words that can be typed."""
    return isinstance(given, list) and all(isinstance(n, str) and "\0" not in n for n in given)
