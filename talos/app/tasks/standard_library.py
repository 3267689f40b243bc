"""Text classification tasks made of the Python standard library's own texts.

A builder returns every candidate text of a task with its label and its group. Which split a
candidate is in is decided in `talos.app.tasks.splits`, by seed.
"""

import fnmatch
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from talos.app.tasks.sources import (
    MIN_CHARS,
    SourceFile,
    cut_lines,
    list_files,
    read_source,
)
from talos.app.tasks.splits import Candidate, cut_regions, deduplicate

# Of about 800 test modules, so many are read, evenly spaced: it takes less than three seconds.
MAX_TEST_FILES = 120
MAX_FILE_BYTES = 100_000
# Code points that share a row are often variants of one character.
CHARACTERS_IN_A_ROW = 64
MAX_LINES = 8
# Shorter docstrings ("Return the value.") hardly have a topic.
MIN_TOPIC_WORDS = 6
# Below these numbers of files the files of a class are cut into regions.
MIN_TOPIC_FILES = 40
MIN_PACKAGE_FILES = 10


@dataclass(frozen=True)
class TaskSource:
    """What a task is and how its candidates are found.

    Attributes:
        name: name in the registry.
        description: what is classified, and how the splits are kept apart.
        classes: class names and, for the zero-shot head, their texts, which were chosen by the
            accuracy of all-MiniLM-L6-v2 on validation data.
        build: finds the candidates in the library's folder.
    """

    name: str
    description: str
    classes: dict[str, str]
    build: Callable[[Path], list[Candidate]]


TOPICS = {
    "networking": (
        "http/*", "urllib/*", "xmlrpc/*", "wsgiref/*", "socket.py", "socketserver.py", "ssl.py",
        "ftplib.py", "telnetlib.py", "asynchat.py", "asyncore.py", "ipaddress.py", "cgi.py",
        "netrc.py", "webbrowser.py",
    ),
    "mail": (
        "email/*", "mailbox.py", "mailcap.py", "smtplib.py", "smtpd.py", "imaplib.py",
        "poplib.py", "nntplib.py", "quopri.py", "mimetypes.py",
    ),
    "files": (
        "os.py", "shutil.py", "pathlib.py", "pathlib/*", "tempfile.py", "zipfile.py", "zipfile/*",
        "tarfile.py", "glob.py", "fnmatch.py", "gzip.py", "bz2.py", "lzma.py", "filecmp.py",
        "fileinput.py", "posixpath.py", "ntpath.py", "genericpath.py", "_compression.py",
        "_pyio.py", "stat.py", "dbm/*", "shelve.py", "zipapp.py",
    ),
    "mathematics": (
        "statistics.py", "_pydecimal.py", "fractions.py", "random.py", "numbers.py", "bisect.py",
        "heapq.py", "colorsys.py", "_pylong.py", "datetime.py", "_pydatetime.py", "calendar.py",
        "zoneinfo/*", "_strptime.py",
    ),
    "concurrency": (
        "asyncio/*", "multiprocessing/*", "concurrent/*", "threading.py", "_threading_local.py",
        "queue.py", "sched.py", "subprocess.py", "signal.py", "selectors.py", "contextvars.py",
    ),
    "markup": (
        "xml/*", "html/*", "json/*", "csv.py", "configparser.py", "plistlib.py", "tomllib/*",
        "string.py", "string/*", "textwrap.py", "difflib.py", "codecs.py", "gettext.py",
        "locale.py", "re/*", "_markupbase.py", "pprint.py", "shlex.py",
    ),
    "programs": (
        "ast.py", "dis.py", "inspect.py", "importlib/*", "typing.py", "abc.py", "types.py",
        "pkgutil.py", "tokenize.py", "lib2to3/*", "pydoc.py", "traceback.py", "pdb.py", "bdb.py",
        "trace.py", "code.py", "codeop.py", "symtable.py", "modulefinder.py", "py_compile.py",
        "compileall.py", "runpy.py", "pyclbr.py", "profile.py", "pstats.py", "opcode.py",
    ),
}  # fmt: skip

PACKAGES = {
    "asyncio": ("asyncio/*",),
    "email": ("email/*",),
    "importlib": ("importlib/*",),
    "multiprocessing": ("multiprocessing/*",),
    "unittest": ("unittest/*",),
    "web": ("http/*", "urllib/*", "wsgiref/*", "xmlrpc/*", "html/*"),
    "xml": ("xml/*",),
}

PURPOSES = {
    "get": ("get", "fetch", "lookup", "current"),
    "check": ("is", "has", "check", "contains", "can", "eq", "lt", "validate", "verify", "match"),
    "describe": ("repr", "str", "format", "print", "show", "display", "help"),
    "read": ("read", "load", "parse", "recv", "readline", "scan", "decode", "find", "search"),
    "write": ("write", "send", "dump", "set", "put", "add", "append", "store", "save", "push"),
    "remove": ("close", "remove", "del", "delete", "delitem", "clear", "exit", "stop", "shutdown",
               "reset", "pop", "cleanup", "discard", "cancel", "quit", "end"),
    "create": ("init", "new", "create", "make", "start", "build", "setup", "copy", "enter"),
}  # fmt: skip

CHARACTERS = {
    "letter": ("Lu", "Ll", "Lt", "Lo", "Lm"),
    "mark": ("Mn", "Mc", "Me"),
    "number": ("Nd", "Nl", "No"),
    "punctuation": ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"),
    "mathematical": ("Sm",),
    "symbol": ("So",),
}
# These words name the class; they are cut out of the names.
GIVEAWAY_WORDS = re.compile(
    r"\b(LETTERS?|SYLLABLES?|IDEOGRAPHS?|MARKS?|COMBINING|DIGITS?|NUMBERS?|NUMERALS?|NUMERIC|PUNCTUATION"
    r"|MATHEMATICAL|SYMBOLS?|SIGNS?)\b"
)
# Left out of tasks that take texts from every module: data written as code, optional or vendored
# packages, and generated text.
OUTSIDE = ("encodings/*", "idlelib/*", "turtledemo/*", "ensurepip/*", "pydoc_data/*", "lib2to3/*",
           "distutils/*", "tkinter/*", "turtle.py")  # fmt: skip

# Words that name the answer of `test_or_library`; lines that hold one are dropped.
TEST_WORDS = re.compile(r"test|assert|mock|support|fail|expect|skip|subTest", re.IGNORECASE)


def _family(families: dict[str, tuple[str, ...]], path: str) -> int | None:
    """Return the index of the family whose patterns match a path."""
    for label, patterns in enumerate(families.values()):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return label
    return None


def _files(
    folder: Path, families: dict[str, tuple[str, ...]]
) -> Iterator[tuple[int, SourceFile, re.Pattern[str]]]:
    """Yield the files of all families, their label, and a pattern of the module's own name."""
    for path in list_files(folder, tests=False):
        label = _family(families, path)
        if label is not None:
            words = [word for word in re.split(r"[/_.]", path[:-3]) if len(word) > 2]
            pattern = re.compile("|".join(map(re.escape, words)) or r"(?!)", re.IGNORECASE)
            yield label, read_source(folder, path), pattern


def _docstring_topic(folder: Path) -> list[Candidate]:
    found = [
        Candidate(text, label, file.path, file.path)
        for label, file, own_name in _files(folder, TOPICS)
        for text in file.docstrings
        if len(text.split()) >= MIN_TOPIC_WORDS and not own_name.search(text)
    ]
    return cut_regions(deduplicate(found), len(TOPICS), MIN_TOPIC_FILES)


def _code_package(folder: Path) -> list[Candidate]:
    names = re.compile(
        "|".join(["html", "http", "urllib", "wsgi", "xmlrpc", *PACKAGES]), re.IGNORECASE
    )
    found = [
        Candidate(text, label, file.path, file.path)
        for label, file, _ in _files(folder, PACKAGES)
        for function in file.functions
        for text in _pieces(
            names.sub("module", function.header), names.sub("module", function.body)
        )
    ]
    return cut_regions(deduplicate(found), len(PACKAGES), MIN_PACKAGE_FILES)


def _pieces(header: str, body: str, limit: int = 2) -> Iterator[str]:
    """Yield the header with the body's first lines, then further disjoint runs of lines."""
    lines = body.splitlines()
    for start in range(0, min(len(lines), limit * MAX_LINES), MAX_LINES):
        run = lines[start : start + MAX_LINES]
        text = cut_lines(
            [header, *_indented(run)]
            if start == 0
            else textwrap.dedent("\n".join(run)).splitlines()
        )
        if len(text) >= 60:
            yield text


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return ("    " + line for line in lines)


def _everywhere(folder: Path) -> Iterator[SourceFile]:
    for path in list_files(folder, tests=False):
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in OUTSIDE):
            yield read_source(folder, path)


def _function_purpose(folder: Path) -> list[Candidate]:
    label_of = {word: label for label, words in enumerate(PURPOSES.values()) for word in words}
    found = []
    for file in _everywhere(folder):
        for function in file.functions:
            verb = re.split(r"_|(?<=[a-z])(?=[A-Z])", function.name.strip("_"))[0]
            label = label_of.get(verb.lower())
            if label is None or len(function.body) < 40:
                continue
            # A call to the base class's function of the same name would give it away.
            text = cut_lines([function.header, *_indented(function.body.splitlines()[:MAX_LINES])])
            text = re.sub(rf"\b{re.escape(function.name)}\b", "f", text)
            found.append(Candidate(text, label, file.path, file.path))
    return deduplicate(found)


def _fragment_kind(folder: Path) -> list[Candidate]:
    found = []
    for file in _everywhere(folder):
        lines = [
            line.strip()
            for function in file.functions
            for line in function.body.splitlines()[1::3]
            if len(line.strip()) >= MIN_CHARS and not re.match(r"""\W*['"]|raise\b""", line.strip())
        ]
        headers = [f.header for f in file.functions if len(f.header) >= MIN_CHARS]
        kinds = (file.docstrings, file.comments, lines, headers, file.messages)
        for label, texts in enumerate(kinds):
            found += [Candidate(text, label, file.path, file.path) for text in texts]
    return deduplicate(found)


def _test_or_library(folder: Path) -> list[Candidate]:
    tests = [
        path
        for path in list_files(folder, tests=True)
        if (folder / path).stat().st_size <= MAX_FILE_BYTES
    ]
    tests = tests[:: -(-len(tests) // MAX_TEST_FILES) or 1]
    found = []
    for label, files in enumerate(
        (_everywhere(folder), (read_source(folder, path) for path in tests))
    ):
        for file in files:
            for function in file.functions:
                lines = [x for x in function.body.splitlines() if not TEST_WORDS.search(x)]
                text = cut_lines(lines[:MAX_LINES])
                if len(lines) >= 2 and len(text) >= 60:
                    found.append(Candidate(text, label, file.path, file.path))
    return deduplicate(found)


def _character_kind(folder: Path) -> list[Candidate]:
    del folder  # The names are the interpreter's own.
    label_of = {
        category: label for label, found in enumerate(CHARACTERS.values()) for category in found
    }
    found = []
    for point in range(0x30000):
        name = unicodedata.name(chr(point), "")
        label = label_of.get(unicodedata.category(chr(point)))
        if not name or label is None or name.startswith(("CJK", "HANGUL", "TANGUT", "NUSHU")):
            continue
        text = " ".join(GIVEAWAY_WORDS.sub("", name).split()).lower()
        if len(text) >= 6 and len(text.split()) >= 2:
            row = f"U+{point - point % CHARACTERS_IN_A_ROW:04X}"
            found.append(Candidate(text, label, row, row))
    return deduplicate(found)


BY_FILE = "No file is in two splits"
BY_REGION = BY_FILE + "; the files of a class that has fewer than {} are split by disjoint regions"
SOURCES = (
    TaskSource(
        "character_kind",
        "The kind of a Unicode character told from its name, without the words that name kinds. "
        "Code points of one row of 64 are in one split.",
        {
            "letter": "a syllable or letter in an ancient script",
            "mark": "an accent or vowel sign",
            "number": "numeral one two three",
            "punctuation": "punctuation",
            "mathematical": "operator, arrow or set relation",
            "symbol": "emoji picture of an object",
        },
        _character_kind,
    ),
    TaskSource(
        "fragment_kind",
        f"What kind of text a fragment of a source file is. {BY_FILE}.",
        {
            "docstring": "documentation: return, create or set something",
            "comment": "a programmer's comment about the implementation",
            "code": "self.value = function(x)",
            "signature": "def function(self, arguments)",
            "error": "error: invalid argument must be",
        },
        _fragment_kind,
    ),
    TaskSource(
        "docstring_topic",
        "What a docstring is about; docstrings with the name of their module are left out. "
        f"{BY_REGION.format(MIN_TOPIC_FILES)}.",
        {
            "networking": "internet addresses, hosts and http",
            "mail": "a mail message, its headers and mailbox",
            "files": "reading and writing files, paths and directories",
            "mathematics": "numbers, statistics, arithmetic and dates",
            "concurrency": "threads, processes and asynchronous tasks",
            "markup": "parsing and writing XML, HTML, JSON and text formats",
            "programs": "inspecting source code and modules",
        },
        _docstring_topic,
    ),
    TaskSource(
        "code_package",
        "The package a piece of code comes from; names of packages are replaced by `module`. "
        f"{BY_REGION.format(MIN_PACKAGE_FILES)}.",
        {
            "asyncio": "asynchronous event loop, transports and coroutines",
            "email": "parsing mail headers",
            "importlib": "importing modules, loaders and specs",
            "multiprocessing": "processes, locks and shared memory",
            "unittest": "running test cases and assertions",
            "web": "url request headers cookie server",
            "xml": "xml parser handler events",
        },
        _code_package,
    ),
    TaskSource(
        "function_purpose",
        "What a function does, told from its code without its name: the verb that names it is the "
        f"class. {BY_FILE}.",
        {
            "get": "look up and return something",
            "check": "test if something is equal or valid",
            "describe": "format a string",
            "read": "read, load, find or decode input",
            "write": "write data",
            "remove": "stop, close, cancel and reset to None",
            "create": "initialise and create a new object",
        },
        _function_purpose,
    ),
    TaskSource(
        "test_or_library",
        "Whether a piece of code comes from a test or from the library itself; lines that hold a "
        f"word such as `test` or `assert` are left out. {BY_FILE}.",
        {
            "library": "if self is None return",
            "test": "x = C(1, 2, 3)",
        },
        _test_or_library,
    ),
)
