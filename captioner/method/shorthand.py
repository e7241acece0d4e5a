"""Prose to dense shorthand by rules: every clause that can be seen becomes a statement. English. Pure text.

A sentence loses its lead-in ("the image shows"), words of opinion ("cozy") and clauses that only interpret
("creating a calm atmosphere"); what is left is cut into clauses, each with its subject: coordinated verbs,
relative clauses, the members of a list. The words stay those of the caption, but that finite verbs become
participles and pronouns the noun they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from captioner.method import words
from captioner.statements import EDGES, mask, normalise, split_statements, visible

LONGEST = 600  # characters of a sentence that is taken apart; of a longer one commas separate

_DETERMINER = (
    r"(?:an?|the|another|each|every|some|several|many|few|both|all|his|her|its|their|this|that|these|those|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d+)"
)
_PICTURE = r"(?:image|picture|photo(?:graph)?)"
_LEAD_IN = re.compile(
    rf"^(?:(?:in|at|on) (?:this|the) {_PICTURE}|(?:also|additionally|finally|meanwhile|overall|"
    r"in addition|furthermore|moreover|notably|here))\b[,:]?\s*|"
    rf"^(?:(?:this|the|an?|it)\s+)?(?:(?:{_PICTURE}|scene|shot)\s+)?"
    r"(?:shows?|depicts?|features|captures?|portrays?|presents|showcases)\s+(?:us\s+)?|"
    rf"^(?:this|it) is (?:an? )?{_PICTURE} of\s+|^(?:this|it) is (?=an?\b)|"
    rf"^(?:an? |the )?{_PICTURE} of\s+|"
    r"^there (?:is|are)(?: also)?\s+|^(?:we|you|one) can (?:also )?see\s+|^visible (?:is|are)\s+",
    re.IGNORECASE,
)
_MOOD = (
    r"(?:atmosphere|mood|ambian?ce|vibe|feel|feeling|sense of|touch of|warmth|charm|beauty|impression|"
    r"overall look|tranquility|serenity|nostalgia|elegance|coziness|calmness)"
)
_INTERPRETS = re.compile(
    r",?\s*\b(?:and |while |which |thus |thereby )?(?:creat|add|giv|lend|mak|provid|contribut|enhanc|reflect|"
    rf"highlight|emphasi[sz]|bring|exud)(?:ing|es|s)\b(?=[^,.;]*\b{_MOOD})[^,.;]*|"
    r",?\s*\b(?:and |which |thus )?(?:evok|convey|suggest|indicat|symboli[sz]|imply|impli|hint)(?:ing|es|s)\b"
    r"[^,.;]*|,?\s*\b(?:which is |who is |and )?"
    r"(?:possibly|probably|perhaps|presumably|likely|maybe|as if|as though)\b[^,.;]*|"
    rf"\s*\b(?:with|for|in) (?:an? )?(?:\w+ )?{_MOOD}[^,.;]*|"
    rf"^(?:the |its )?(?:overall |general |whole )?{_MOOD}\b[^.;]*",
    re.IGNORECASE,
)
_OPINION = re.compile(
    r"\b(?:(?:very|quite|really|truly|incredibly|rather|so|most|clearly|neatly? and) )?"
    r"(?:beautiful(?:ly)?|stunning(?:ly)?|gorgeous|lovely|amazing|breathtaking|impressive|co[sz]y|inviting|serene|"
    r"peaceful|tranquil|charming|picturesque|majestic|delicious(?:-looking)?|appetizing|mouth-?watering|adorable|cute|"
    r"nostalgic|magnificent|delightful|idyllic|enchanting|mesmerizing|captivating|striking|iconic|famous|well-known|"
    r"expensive|luxurious|stylish|pleasant|wonderful|incredible|spectacular|splendid|fantastic|homely|welcoming|"
    r"award-winning|high-quality|homeless)\b",
    re.IGNORECASE,
)
_HEDGE = re.compile(r"\b(?:what )?(?:appears?|seems?)(?: to be| like)?\b\s*", re.IGNORECASE)
_VERBS = """
sit stand lie lean hang hold wear carry ride drive walk run jump look gaze stare watch read write eat
drink sleep rest play show display contain feature include cover surround face point extend stretch
rise tower line fill decorate adorn touch swim fly float drift graze perch climb cross pass stack
spell say cast shine glow fall grow bloom sprout emerge lead border separate frame support connect
overlook span burn operate cling raise pour wait work cook cut slice throw kick catch pull push chase
feed smile laugh wave dance sing paint draw list
"""
_DOUBLED = frozenset("sit run swim cut span spin jog hug grab drag chop".split())  # noqa: SIM905


def _participle(verb: str) -> str:
    if verb == "lie":
        return "lying"
    if verb in _DOUBLED:
        return f"{verb}{verb[-1]}ing"
    return (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"


_PARTICIPLES = {verb: _participle(verb) for verb in _VERBS.split()}
_FINITE = {
    form: participle
    for verb, participle in _PARTICIPLES.items()
    for form in (
        verb,
        f"{verb[:-1]}ies"
        if re.search(r"[^aeou]y$", verb)
        else verb + ("es" if re.search(r"(?:s|sh|ch|x)$", verb) else "s"),
    )
}
_FINITE |= {"features": "with", "feature": "with"}
_SINGULAR = frozenset(form for form in _FINITE if form not in _PARTICIPLES)
_VERB = "|".join(sorted(_SINGULAR, key=len, reverse=True))
_ANY_VERB = "|".join(sorted(_FINITE, key=len, reverse=True))
_PLURAL_VERB = "|".join(_PARTICIPLES)
_BE = r"(?:is|are|was|were)"
_ING = rf"(?!(?:{'|'.join(words.THINGS_IN_ING.split())})\b)\w+ing"
_PLACE = (
    r"(?:in|on|at|to|behind|beside|above|below|beneath|under|underneath|near|around|along|across|between|inside|outside|"
    r"over|against|among|next to|in front of|on top of|to the (?:left|right)(?: of)?)"
)
_BEHIND = (
    rf"(?:{_DETERMINER}|{_PLACE}|from|with|toward|matching|neatly|open)\b"  # what a plural verb has behind it
)


def shorthand(caption: str) -> list[str]:
    """The statements of a prose caption, in its order, once each; those of shorthand stay as they are."""
    masked, restore = mask(caption)
    found: dict[str, str] = {}
    subject = ""
    for sentence in re.split(r"(?<=[\w)\x02])[.!?]+(?:\s+|$)|\n+|;\s*", masked):
        if len(sentence) > LONGEST:
            clauses: Iterable[str] = split_statements(sentence)
        else:
            clauses = _clauses(_seen(sentence))
        for clause in clauses:
            made = list(_statements(clause, subject))
            subject = _head(clause) or subject
            for statement in made:
                text = _tidy(restore(statement))
                if re.search(r"\w", text):
                    found.setdefault(normalise(text), text)
    said = list(found.values())
    return [
        one
        for one, after in zip_longest(said, said[1:], fillvalue="")
        if not after.startswith(f"{one} ") and any(map(str.isalnum, one))
    ]


# ---------------------------------------------------------------- what can be seen


def is_plain(statement: str) -> bool:
    """Whether it only names what can be seen: no lead-in, opinion, mood, guess or interpretation."""
    patterns = (_LEAD_IN, _INTERPRETS, _OPINION, _HEDGE)
    said, _ = mask(statement)  # a quotation may say anything
    return visible(said) and not any(pattern.search(said) for pattern in patterns)


def _seen(sentence: str) -> str:
    """The sentence without lead-in, opinion and interpretation."""
    text, before = " ".join(sentence.split()), None
    while text != before:
        before = text
        text = _LEAD_IN.sub("", text, count=1)
    taken = r"^(?:the |this )?(?:image|picture|photo(?:graph)?) (?:is|was) taken ([^,.]+?) and shows (.+)$"
    text = re.sub(taken, r"\2 \1", text, flags=re.IGNORECASE)
    text = _INTERPRETS.sub("", text)
    text = _OPINION.sub(" ", text)
    text = _HEDGE.sub(lambda match: "is " if match[0].lower().startswith(("a", "s")) else "", text)
    text = re.sub(rf"\b({_BE}) {_BE}\b", r"\1", text)
    text = re.sub(r"\b(?:that )?can be seen\b", "", text)
    text = re.sub(r"^it (?:is|was) (?=\w+(?:ing|y)\b)", "", text, flags=re.IGNORECASE)  # it is raining
    text = re.sub(rf"\b({_DETERMINER}|{_BE})\s+(?:,|and)\s+", r"\1 ", text)  # "a  and modern", "a , modern"
    text = re.sub(r"\s*,\s*(?=[,;]|$)|\s+and\s*(?=[,;.]|$)", "", text)
    text = re.sub(r"\ba\s+(?=[aeio]\w)", "an ", re.sub(r"\s+", " ", text).strip(EDGES))
    text = re.sub(r"\ban\s+(?=[^aeiouh\W])", "a ", text)
    return "" if re.fullmatch(rf"(?:{_DETERMINER} )?[\w ]+ {_BE}", text, re.IGNORECASE) else text


# ---------------------------------------------------------------- clauses


def _clauses(sentence: str) -> Iterator[str]:
    """Main clauses of a sentence, and after each the relative clauses cut out of it, with their subject."""
    if not sentence:
        return
    told = rf"(?:{_BE}|has|have|{_ANY_VERB})\b"
    subject = rf"(?:(?:{_DETERMINER}|only|people)\b|he\b|she\b|it\b|they\b)[^,]*?\b{told}"
    bare = rf"(?:[\w-]+ ){{1,3}}{_BE}\b|(?:[\w-]+ ){{0,2}}\w+s (?:{_PLURAL_VERB}) {_BEHIND}"
    joints = (
        rf",?\s+(?:and|while|whereas|but|as)\s+(?=(?![^,]*\b(?:that|which|who|whose)\b){subject})",
        rf",?\s+and\s+(?={bare})",
        rf",\s+(?=(?:the|an?) (?:[\w-]+ ){{1,3}}{_BE}\b)",
        r",\s+(?:and\s+)?(?=(?:with (?!\w+ of)|its |his |her |their ))|\s+where\s+",
    )
    parts, start = [], 0
    for match in re.finditer("|".join(joints), sentence, re.IGNORECASE):
        before = sentence[start : match.start()]
        if re.search(rf"\b(?:{_BE}|has|have|{_ING}|{_ANY_VERB})\b(?! of\b)", before) or "where" in match[0]:
            parts.append(before)
            start = match.end()
    for part in [*parts, sentence[start:]]:
        main, relatives = _relatives(re.sub(r"^with\s+", "", part))
        yield main
        yield from relatives


def _relatives(clause: str) -> tuple[str, list[str]]:
    """The clause without its relative clauses in commas, and those with the noun they stand behind."""
    found = []

    def cut(match: re.Match[str]) -> str:
        noun = _last_noun(match["before"])
        pronoun, rest = match["pronoun"].lower(), match["rest"].strip()
        if pronoun == "whose":
            found.append(f"{rest}")
        elif match["count"]:
            found.append(f"{match['count']} {re.sub(f'^{_BE} ', '', rest)} {noun}")
        else:
            found.append(f"the {noun} {rest}")
        return match["before"] + (" " if match["end"] == "," else "")

    def through(match: re.Match[str]) -> str:
        found.append(f"{match[3]} {match[2].lower()} the {_last_noun(match[1])}")
        return match[1]

    clause = re.sub(rf"([^,]+),\s+(through|{_PLACE}) which\s+([^,]+)$", through, clause, flags=re.IGNORECASE)
    pattern = re.compile(
        r"(?P<before>[^,]+),\s+(?:(?P<count>\w+) of )?(?P<pronoun>which|who|whose)\s+"
        r"(?P<rest>[^,]+)(?P<end>,|$)"
    )
    text = pattern.sub(cut, clause)
    text = re.sub(r"\s+whose\s+([^,]+)", lambda m: _of_whom(m, found), text)
    text = re.sub(rf"\b(?:that|which|who) (?:{_BE}|has been|have been)\s+", "", text)
    text = re.sub(r"\b(?:that|which|who) (?:has|have)\b", "with", text)
    text = re.sub(
        rf"\b(?:that|which|who) ({_ANY_VERB})\b",
        lambda match: _FINITE[match[1].lower()],
        text,
        flags=re.IGNORECASE,
    )
    return text, found


def _of_whom(match: re.Match[str], found: list[str]) -> str:
    found.append(match[1])
    return ""


def _last_noun(text: str) -> str:
    """The noun phrase that ends a text: behind its last determiner, preposition or verb."""
    cut = re.split(
        rf"\b(?:{_DETERMINER}|of|with|from|into|onto|{_PLACE}|{_ANY_VERB}|{_BE}|{_ING}(?= {_DETERMINER} ))\s",
        text.strip(),
        flags=re.IGNORECASE,
    )
    return cut[-1].strip() or text.strip()


def _head(clause: str) -> str:
    """The subject of a clause, without what stands behind it."""
    match = re.match(
        rf"^(?:{_PLACE} [^,]*,\s*)?(?P<subject>.+?)\s+(?:{_BE}|has|have|{_ING}|with|in|on|of|{_VERB})\b",
        clause,
        re.IGNORECASE,
    )
    subject = match["subject"] if match else ""
    if re.fullmatch(r"(?i)he|she|it|they|one.*|his.*|her.*|its.*|their.*", subject):
        return ""
    return (
        re.sub(rf"^{_DETERMINER}\s+", "", subject, flags=re.IGNORECASE) if len(subject.split()) <= 6 else ""
    )


# ---------------------------------------------------------------- statements


def _statements(clause: str, subject: str) -> Iterator[str]:
    """What a clause states; ``subject`` is what a pronoun stands for."""
    clause = _pronouns(clause.strip(EDGES), subject)
    clause, place = _fronted(clause)
    match = _finite(clause)
    if match is None:
        for item in _items(clause):
            yield _with(item, place)
        return
    who, verb = match["who"], match["verb"].lower()
    head, *apart = re.split(r",\s+(?=\w+(?:ed|ing)\b|built\b|made\b)", who.rstrip(","))
    who = head
    yield from (f"{who} {each}" for each in apart)
    held = _items(who)
    if len(held) > 1:  # "a plate with eggs, toast and bacon sits ...": what it holds is told once
        yield from held
        who = re.split(r"\s(?:with|containing|including|holding|in shades of)\s", who)[0]
    for at, rest in enumerate(_predicates(match["rest"], verb)):
        again = re.match(rf"^({_BE}|has|have|{_ANY_VERB})\b\s*(.*)$", rest, re.IGNORECASE)
        own, told = (again[1].lower(), again[2]) if again and at else (verb, rest)
        for item in _predicate(who, own, told):
            yield _with(item, place if at == 0 else "")


def _finite(clause: str) -> re.Match[str] | None:
    """Subject, finite verb and the rest.

    Plural verbs look like nouns: they want a plural subject before them, an article or a preposition behind.
    """
    one = rf"^(?P<who>.+?)\s+(?P<verb>{_BE}|has|have|{_VERB})\b(?! of\b)\s*(?P<rest>.*)$"
    many = (
        rf"^(?P<who>(?:.*?\b(?:\w+s|people|children|men|women|sheep)\b.*?))\s+(?P<verb>{_PLURAL_VERB})"
        rf"\s+(?P<rest>{_BEHIND}.*)$"
    )
    found = [match for form in (one, many) if (match := re.match(form, clause, re.IGNORECASE))]
    found = [
        m
        for m in found
        if not re.search(r"\b(?:with|of|in|on|and|an?|the|his|her|its|their)$", m["who"], re.IGNORECASE)
    ]
    return min(found, key=lambda match: len(match["who"]), default=None)


def _predicates(rest: str, verb: str) -> list[str]:
    """Coordinated predicates: "sitting on a bench and reading a book"."""
    plural = verb in ("are", "have") or verb in _PARTICIPLES
    verbs = rf"{_VERB}\b|(?:{_PLURAL_VERB}) {_BEHIND}" if plural else rf"{_VERB}\b"
    start = rf"(?:{_ING}\b(?! and)|{_BE}\b|has\b|have\b|{verbs})"
    return [part for part in re.split(rf",?\s+and\s+(?={start})|,\s+(?={_ING}\b)", rest) if part]


def _predicate(who: str, verb: str, rest: str) -> Iterator[str]:
    plain = re.sub(rf"^{_DETERMINER}\s+(?=\w)", "", who, flags=re.IGNORECASE) if not _counts(who) else who
    if verb in ("has", "have"):
        yield from (f"{who} with {item}" for item in _items(rest))
    elif re.fullmatch(_BE, verb):
        first = rest.split(" ", 1)[0].lower()
        if re.match(rf"{_DETERMINER}$", first) and not _counts(who):
            generic = re.fullmatch(
                r"(?i)(?:the |this )?(?:scene|setting|image|background|it|animal|object)", who
            )
            yield rest if generic else f"{who} {rest}"
        elif _adjectives(rest) and not re.search(r"\b(?:with|in|on|behind|under)\b", plain):
            yield f"{rest} {plain}"
        elif match := re.fullmatch(
            r"(?P<adjective>[a-z]+(?<!ed)(?: and [a-z]+(?<!ed))?) (?P<more>with .+)", rest
        ):
            yield (
                f"{match['adjective']} {plain} {match['more']}" if _adjectives(match[1]) else f"{who} {rest}"
            )
        else:
            yield f"{who} {rest}"
    else:
        yield from (f"{who} {_FINITE[verb]} {item}".strip() for item in _items(rest or " "))


def _counts(who: str) -> bool:
    number = "|".join(words.COUNTS.split()[1:])
    return bool(
        re.match(rf"(?:{number}|\d+|several|many|both|another|all|every|some|a few)\b", who, re.IGNORECASE)
    )


def _adjectives(text: str) -> bool:
    """Whether a predicate is one or two adjectives that can stand before the noun."""
    parts = re.split(r" and |, ", text)
    one = r"(?:(?:half|very|dark|light|bright) )?(?!\w+ing\b|partly|visible|there|here)[a-z-]+"
    return len(parts) <= 3 and all(re.fullmatch(one, part) for part in parts)


def _items(text: str) -> list[str]:
    """The members of a list, each with the head that the first one stands behind: "plate with eggs"."""
    parts = [part for part in re.split(r",\s+(?:and\s+)?", text) if part.strip()]
    if len(parts) < 2:
        return [text.strip()] if text.strip() else [""]
    last = re.split(rf"\s+and\s+(?={_DETERMINER}\s)", parts[-1])
    parts = [*parts[:-1], *last]
    head = re.match(
        r"^(?P<head>.+?\s(?:with|containing|including|holding|in shades of))\s+(?P<item>.+)$", parts[0]
    )
    if head is None or not all(re.match(r"[\w\x01]", part) for part in parts):
        return parts
    return [f"{head['head']} {item}" for item in (head["item"], *parts[1:])]


def _with(statement: str, place: str) -> str:
    return f"{statement} {place}".strip() if place else statement


def _fronted(clause: str) -> tuple[str, str]:
    """The clause without a place in front, and that place: "on the wall hang two pictures"."""
    there = rf"^(?P<place>{_PLACE} [^,]+?),?\s+there (?:is|are)\s+(?P<rest>.+)$"
    match = re.match(there, clause, re.IGNORECASE) or re.match(
        rf"^(?P<place>{_PLACE} [^,]+?),\s+(?P<rest>.+)$", clause, re.IGNORECASE
    )
    if match:
        return match["rest"], _lower(match["place"])
    match = re.match(
        rf"^(?P<place>{_PLACE} [^,]+?)\s+(?P<verb>{_BE}|{_ANY_VERB})\s+(?P<rest>(?:{_DETERMINER}|only)\b.+)$",
        clause,
        re.IGNORECASE,
    )
    if match is None:
        return clause, ""
    verb = _FINITE.get(match["verb"].lower(), "")
    return match["rest"], f"{verb} {_lower(match['place'])}".strip()


def _pronouns(clause: str, subject: str) -> str:
    """The clause with the noun for a pronoun that is its subject."""
    if not subject:
        return clause
    clause = re.sub(r"^the one\b", f"the {subject.split()[-1]}", clause, flags=re.IGNORECASE)
    clause = re.sub(r"^(?:he|she|it|they)\b", f"the {subject}", clause, flags=re.IGNORECASE)
    return re.sub(r"^one of them\b", "one", clause, flags=re.IGNORECASE)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _tidy(statement: str) -> str:
    """Without the articles that begin it and double spaces."""
    text = " ".join(statement.split()).strip(EDGES)
    text = re.sub(r"^(?:and|with|as|while|but)\s+", "", text, flags=re.IGNORECASE)
    text = re.sub(r"^(?:an?|the|his|her|its|their)\s+(?=\w)", "", text, flags=re.IGNORECASE)
    return _lower(text) if not re.match(r"[A-Z]{2}|[A-Z][\w]* [A-Z]", text) else text
