"""Personal data and secrets: where they stand in a text, and of which kind.

Patterns say where to look, rules with a meaning decide: check digits (python-stdnum), numbering plans (phonenumbers),
address registries (ipaddress), the list of top-level domains (tldextract). Every pattern is bounded and begins at the
beginning of a word, so that the time grows with the length of the text whatever stands in it.

Left as they are, on purpose: addresses and numbers that belong to nobody (example.com, 192.0.2.1, 555-0123), private
networks and public resolvers, and mailboxes of machines (git@, noreply@).
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

Span = tuple[int, int]
KINDS = ("secret", "email", "iban", "card", "national_id", "phone", "ip")
"""In the order in which they are looked for: what one kind has claimed, none after it sees."""
CUE = 40
"""Characters before a number in which a word may say what it is."""
FILLER = "\0"
"""Stands where a kind has been found, while the kinds after it are looked for."""


@dataclass(frozen=True)
class Found:
    """One thing found.

    Args:
        kind: of KINDS.
        begin: its first character.
        end: the character after its last.
    """

    kind: str
    begin: int
    end: int


def find(text: str, kinds: Sequence[str] = KINDS, regions: Sequence[str] = ("US", "GB")) -> list[Found]:
    """All that is found, in the order of the text, without overlaps.

    Args:
        text: where to look.
        kinds: what to look for, of KINDS.
        regions: countries (ISO 3166, two letters) whose phone numbers are known without their international prefix.
    """
    found = []
    for kind in KINDS:
        if kind not in kinds:
            continue
        for detector in DETECTORS[kind]:
            spans = list(detector(text, regions))
            found += [Found(kind, *span) for span in spans]
            text = replaced(text, spans, lambda begin, end: FILLER * (end - begin))
    return sorted(found, key=lambda one: one.begin)


def replaced(text: str, spans: Sequence[Span], replacement: Callable[[int, int], str]) -> str:
    """The text with every span replaced; they are in order and do not overlap."""
    if not spans:
        return text
    parts, done = [], 0
    for begin, end in spans:
        parts += [text[done:begin], replacement(begin, end)]
        done = end
    return "".join([*parts, text[done:]])


def cued(text: str, begin: int, cue: re.Pattern[str]) -> bool:
    """Whether a word shortly before says what follows."""
    return cue.search(text, max(0, begin - CUE), begin) is not None


# --- secrets

KEY_BLOCK = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
KEY_END = re.compile(r"-----END (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
KEY_BODY = re.compile(r"[A-Za-z0-9+/=:,\s\\-]{0,16384}")
LONGEST_KEY = 16_384
"""Characters of a key block; what is longer is no key."""
TOKENS = {
    # how every key of a service begins: how it goes on
    "AKIA": r"[A-Z2-7]{16}",  # AWS
    "ASIA": r"[A-Z2-7]{16}",
    "ghp_": r"[A-Za-z0-9]{36,255}+",  # GitHub
    "gho_": r"[A-Za-z0-9]{36,255}+",
    "ghu_": r"[A-Za-z0-9]{36,255}+",
    "ghs_": r"[A-Za-z0-9]{36,255}+",
    "ghr_": r"[A-Za-z0-9]{36,255}+",
    "github_pat_": r"\w{22,255}+",
    "glpat-": r"[\w-]{20,64}+",  # GitLab
    "xox": r"[abeoprs]-[A-Za-z0-9-]{10,250}+",  # Slack
    "AIza": r"[\w-]{35}",  # Google
    "sk_live_": r"[A-Za-z0-9]{16,247}+",  # Stripe
    "rk_live_": r"[A-Za-z0-9]{16,247}+",
    "sk-": r"[\w-]{20,250}+",  # OpenAI, Anthropic
    "hf_": r"[A-Za-z]{34}",  # Hugging Face
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-AgE": r"[\w-]{50,250}+",
    "SG.": r"[\w-]{22}\.[\w-]{43}",  # SendGrid
    "eyJ": r"[\w-]{10,1000}+\.eyJ[\w-]{10,4000}+\.[\w-]{16,1000}+",  # JSON web tokens (RFC 7519)
}
TOKEN_PATTERNS = {
    begin: re.compile(rf"{re.escape(begin)}(?<![\w-]{re.escape(begin)}){rest}(?![\w-])")
    for begin, rest in TOKENS.items()
}
SAMPLE = re.compile(r"example|sample|dummy|changeme|placeholder|redacted|your|xxxx|0000|1234567|abcdef", re.IGNORECASE)
URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/:@\"'<>]{3,128})@")
NAMES = (
    *("secret", "token", "password", "passwd", "pwd", "api_key", "apikey", "api-key", "access_key", "accesskey"),
    *("private_key", "auth_key", "client_key", "credential", "authorization"),
)
VALUE = re.compile(
    r"\w{0,20}+[\"']?\s{0,3}(?::=|=>|[:=])\s{0,3}(?:(?:bearer|basic|token)\s{1,3})?"
    r"(?:\"([^\"\s]{8,256}+)\"|'([^'\s]{8,256}+)'|([\w+/=~-]{16,256}+)(?![(.\[]))",
    re.IGNORECASE,
)
ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
LEAST_ENTROPY = 3.0
"""Bits per character of a value that is taken for a secret; English words have about 2.5 to 3, random hex 3.5 to 4."""


def key_blocks(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Private keys in PEM, with or without an end."""
    done = 0
    for match in KEY_BLOCK.finditer(text) if "PRIVATE KEY" in text else ():
        if match.start() < done:
            continue
        body = KEY_BODY.match(text, match.end())
        assert body is not None  # it matches nothing too
        end = KEY_END.search(text, match.end(), match.end() + LONGEST_KEY)
        following = KEY_BLOCK.search(text, match.end(), end.start() if end else match.end() + LONGEST_KEY)
        if end and not following:
            done = end.end()
        else:
            done = min(body.end(), following.start()) if following else body.end()
        yield match.start(), done


def tokens(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Keys of known services, by their shape."""
    found = [
        match.span()
        for begin, pattern in TOKEN_PATTERNS.items()
        if begin in text
        for match in pattern.finditer(text)
        if not match[0].endswith("EXAMPLE") and entropy(match[0]) >= LEAST_ENTROPY
    ]
    yield from disjoint(found)


def url_passwords(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """The password in scheme://user:password@host."""
    for match in URL_PASSWORD.finditer(text) if "://" in text else ():
        if not set(match[1]) & set("${}<>*[]%") and not SAMPLE.search(match[1]) and match[1].lower() not in NAMES:
            yield match.span(1)


def assignments(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Values that look random, assigned to what is called a key, token or password."""
    lower = text.lower()
    if len(lower) != len(text):  # some letters become two
        lower = text.translate(ASCII_LOWER)
    found = []
    for name in NAMES:
        position = lower.find(name)
        while position >= 0:
            position += len(name)
            if match := VALUE.match(text, position):
                number = match.lastindex or 0
                if random_looking(match[number]):
                    found.append(match.span(number))
            position = lower.find(name, position)
    yield from disjoint(found)


def random_looking(value: str) -> bool:
    """Whether no one would write it by hand: letters and digits mixed, many different ones, no word for a sample."""
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return mixed and entropy(value) >= LEAST_ENTROPY and not SAMPLE.search(value) and not set(value) & set("${}<>()[] ")


def entropy(value: str) -> float:
    """Of the characters of a value, in bits per character (Shannon 1948)."""
    counts = Counter(value).values()
    return math.log2(len(value)) - sum(count * math.log2(count) for count in counts) / len(value)


# --- e-mail

LOCAL = re.compile(r"[\w!#$%&'*+/=?^`{|}~.-]{1,65}")
LONGEST_LOCAL = 64
"""Characters before the @ (RFC 5321, section 4.5.3.1)."""
DOMAIN = re.compile(r"@((?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,6}([^\W\d_]{2,24}))(?![\w@]|-\w|\.\w)")
RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$", re.IGNORECASE)
"""Domains of nobody (RFC 2606, RFC 6762)."""
MACHINES = frozenset({"git", "noreply", "no-reply", "donotreply", "do-not-reply", "mailer-daemon"})


@cache
def top_level_domains() -> frozenset[str]:
    """As they were when tldextract was packed; nothing is fetched."""
    import tldextract

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None).tlds
    return frozenset(suffix.rsplit(".", 1)[-1] for suffix in suffixes)


def emails(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Addresses under a top-level domain that exists."""
    for match in DOMAIN.finditer(text):
        at = match.start()
        before = LOCAL.match(text[max(0, at - LONGEST_LOCAL - 1) : at][::-1])
        if before is None or match[2].lower() not in top_level_domains() or RESERVED.search(match[1]):
            continue
        local = before[0][::-1].lstrip("'`{|/=*.-?&#")
        if 1 <= len(local) <= LONGEST_LOCAL and not local.endswith(".") and local.lower() not in MACHINES:
            yield at - len(local), match.end()


# --- bank accounts and payment cards

IBAN = re.compile(r"[A-Z](?<!\w[A-Z])[A-Z]\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(r"\d(?<![\w.,+-]\d)\d{3}(?:[ -]?\d){9,15}(?!\w|[.,-]\d)")
NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|64[4-9]\d|65\d\d|62\d\d)\d{12,15}"  # Discover, UnionPay
    r"|(?:30[0-5]|309|36\d|38\d|39\d)\d{11}"  # Diners Club
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
)
"""Prefixes and lengths that payment networks issue (ISO/IEC 7812)."""
LAST_DIGIT = re.compile(r"\d(?= )|\d$")
CARD_GROUPS = ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 1))


def ibans(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """International bank account numbers: length by country, check digits modulo 97 (ISO 13616)."""
    from stdnum import iban

    for match in IBAN.finditer(text):
        # Words in capitals may follow; they are cut off group by group.
        value = match[0]
        while value and not iban.is_valid(value):
            value = value[: max(value.rfind(" "), value.rfind("-"), 0)]
        if value:
            yield match.start(), match.start() + len(value)


def cards(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Numbers of payment cards: digits together or grouped as on the card, issued prefix, Luhn's check digit."""

    def is_card(begin: int, end: int) -> bool:
        groups = re.split(r"[ -]", text[begin:end])
        digits = "".join(groups)
        grouped = len(groups) == 1 or tuple(map(len, groups)) in CARD_GROUPS
        return grouped and NETWORKS.fullmatch(digits) is not None and luhn(digits)

    return longest(text, CARD, is_card)


def longest(text: str, pattern: re.Pattern[str], accepted: Callable[[int, int], bool]) -> Iterator[Span]:
    """Numbers in groups of digits. Two in a row look like one: of what matches, the longest beginning that is accepted,
    and if none is, what begins after its first group."""
    position = 0
    while match := pattern.search(text, position):
        begin = match.start()
        ends = [begin + group.end() for group in LAST_DIGIT.finditer(match[0])]
        end = next((end for end in reversed(ends) if accepted(begin, end)), None)
        if end:
            yield begin, end
        position = end or (begin + 1 if text[begin] == "(" else ends[0])


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = sum(sum(divmod(int(digit) * (2 if place % 2 else 1), 10)) for place, digit in enumerate(reversed(digits)))
    return total % 10 == 0


# --- national identifiers


@dataclass(frozen=True)
class Identifier:
    """A number that a state gives to its people.

    Args:
        shape: what it looks like, beginning at the beginning of a word.
        validator: module of stdnum that knows its check digits; empty where the shape is all there is.
        cue: a word that must stand before it, where one number in a hundred or more would pass by chance.
    """

    shape: str
    validator: str
    cue: str = ""


IDENTIFIERS = {
    "us_ssn": Identifier(r"\d{3}-\d{2}-\d{4}", "us.ssn"),
    "us_ssn_plain": Identifier(r"\d{9}", "us.ssn", cue=r"\bssn\b|social security"),
    "ca_sin": Identifier(r"\d{3}[ -]\d{3}[ -]\d{3}", "ca.sin", cue=r"\bsin\b|social insurance"),
    "ca_sin_plain": Identifier(r"\d{9}", "ca.sin", cue=r"\bsin\b|social insurance"),
    "nl_bsn": Identifier(r"\d{9}", "nl.bsn", cue=r"\bbsn\b|\bsofi|burgerservice"),
    "au_tfn": Identifier(r"\d{3} ?\d{3} ?\d{3}", "au.tfn", cue=r"\btfn\b|tax file"),
    "gb_nino": Identifier(r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]", ""),
    "gb_nhs": Identifier(r"\d{3}[ -]?\d{3}[ -]?\d{4}", "gb.nhs", cue=r"\bnhs\b"),
    "fr_nir": Identifier(r"[12] ?\d\d ?[01]\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", "fr.nir"),
    "de_idnr": Identifier(r"\d\d ?\d{3} ?\d{3} ?\d{3}", "de.idnr", cue=r"steuer|\bidnr\b"),
    "es_dni": Identifier(r"\d{8}-?[A-HJ-NP-TV-Z]", "es.dni"),
    "es_nie": Identifier(r"[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z]", "es.nie"),
    "it_codice": Identifier(
        r"[A-Z]{6}[\dL-NP-V]{2}[A-EHLMPR-T][\dL-NP-V]{2}[A-Z][\dL-NP-V]{3}[A-Z]", "it.codicefiscale"
    ),
    "be_nn": Identifier(r"\d\d\.?\d\d\.?\d\d-\d{3}[. ]?\d\d", "be.nn"),
    "pt_cc": Identifier(r"\d{8} ?\d ?[A-Z0-9]{2}\d", "pt.cc", cue=r"cidad[aã]o"),
    "pl_pesel": Identifier(r"\d{11}", "pl.pesel", cue=r"pesel"),
    "no_fodselsnummer": Identifier(r"\d{6} ?\d{5}", "no.fodselsnummer", cue=r"f[oø]dselsn|personn"),
    "tr_kimlik": Identifier(r"\d{11}", "tr.tckimlik", cue=r"kimlik"),
    "se_personnummer": Identifier(r"(?:\d\d)?\d{6}[-+]\d{4}", "se.personnummer"),
    "dk_cpr": Identifier(r"\d{6}-\d{4}", "dk.cpr", cue=r"\bcpr\b|personnummer"),
    "fi_hetu": Identifier(r"\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]", "fi.hetu"),
    "ch_ahv": Identifier(r"756\.\d{4}\.\d{4}\.\d\d", "ch.ssn"),
    "br_cpf": Identifier(r"\d{3}\.\d{3}\.\d{3}-\d\d", "br.cpf"),
    "br_cpf_plain": Identifier(r"\d{11}", "br.cpf", cue=r"\bcpf\b"),
    "mx_curp": Identifier(r"[A-Z]{4}\d{6}[HMX][A-Z]{5}[A-Z\d]\d", "mx.curp"),
    "in_aadhaar": Identifier(r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}", "in_.aadhaar", cue=r"aadha+r|uidai"),
    "cn_ric": Identifier(r"[1-9]\d{16}[\dX]", "cn.ric"),
    "kr_rrn": Identifier(r"\d{6}-[0-9]\d{6}", "kr.rrn"),
    "za_id": Identifier(r"\d{13}", "za.idnr", cue=r"\bid\b|identity"),
}
CANDIDATE = re.compile(r"[A-Z\d](?<![\w.,+/-][A-Z\d])(?=[A-Z]{0,5}[ -]?\d)(?=(?:[ .+-]?[A-Z\d]){7})")
"""Where a number may begin: a look that costs little, before the many shapes."""
BY_SHAPE = {
    re.compile(shape): [one for one in IDENTIFIERS.values() if one.shape == shape]
    for shape in sorted({one.shape for one in IDENTIFIERS.values()})
}
SHAPE = re.compile("(?:" + "|".join(shape.pattern for shape in BY_SHAPE) + r")(?!\w|[.,/-]\w)")


def national_ids(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Numbers of many countries, by shape and check digits; short ones only where a word says so."""
    done = 0
    for candidate in CANDIDATE.finditer(text):
        match = SHAPE.match(text, candidate.start()) if candidate.start() >= done else None
        if match and any(
            confirmed(text, match, identifier)
            for shape, identifiers in BY_SHAPE.items()
            if shape.fullmatch(match[0])
            for identifier in identifiers
        ):
            yield match.span()
            done = match.end()


def confirmed(text: str, match: re.Match[str], identifier: Identifier) -> bool:
    """Whether the check digits are right, and a word before says what it is where they do not say enough."""
    if identifier.cue and not cued(text, match.start(), re.compile(identifier.cue, re.IGNORECASE)):
        return False
    return not identifier.validator or validator(identifier.validator)(match[0])


@cache
def validator(name: str) -> Callable[[str], bool]:
    return import_module(f"stdnum.{name}").is_valid


# --- phone numbers

PHONE = re.compile(r"[+(\d](?<![\w.,:/+-][+(\d])\+?(?:[ .()/-]{0,2}\d){6,14}(?!\w|[.,:/-]\d)")
PHONE_CUE = re.compile(r"tel|phone|call|fax|mobile|cell|whatsapp|\bsms\b|\btext\b|dial|hotline|[☎☏📞📱]", re.IGNORECASE)
FICTION = re.compile(r"\+1\d{3}55501\d\d|\+44(?:1632960|1\d\d4960|2079460|7700900|8081570)\d{3}")
"""Numbers that nobody is given: NANP 555-0100 to 555-0199, Ofcom's numbers for drama."""
LEAST_DIGITS = 7
MOST_GROUPS = 7
LINES = ("fixed_line", "mobile", "toll_free", "premium_rate", "shared_cost", "personal_number", "voip", "uan")


def phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """International numbers with +, and those of the regions if written as there, or if a word says so."""
    return longest(text, PHONE, lambda begin, end: is_phone(text, begin, end, regions))


def is_phone(text: str, begin: int, end: int, regions: Sequence[str]) -> bool:
    """Whether a number is given out, and is no other number that happens to look like it."""
    import phonenumbers

    written = text[begin:end]
    if written.count(" ") >= MOST_GROUPS:
        return False
    groups = re.findall(r"\d+", written)
    digits = "".join(groups)
    if len(digits) < LEAST_DIGITS or len(groups[-1]) < 2 or written.count("(") != written.count(")"):
        return False
    if "+" in written:
        possible = ["ZZ"]
    else:
        named = cued(text, begin, PHONE_CUE)
        possible = [region for region in regions if (named or len(groups) > 1) and dialled(region).fullmatch(digits)]
    for region in possible:
        try:
            number = phonenumbers.parse(written, region)
        except phonenumbers.NumberParseException:
            continue
        if not phonenumbers.is_valid_number(number):
            continue
        if FICTION.fullmatch(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)):
            return False
        if region == "ZZ" or named or as_written_there(groups, number):
            return True
    return False


@cache
def dialled(region: str) -> re.Pattern[str]:
    """The digits of a country's numbers, with and without its trunk prefix: a quick look before parsing."""
    import phonenumbers

    plan: Any = phonenumbers.PhoneMetadata.metadata_for_region(region)
    patterns = [getattr(plan, name) for name in LINES]
    found = "|".join(one.national_number_pattern for one in patterns if one and one.national_number_pattern)
    return re.compile(f"(?:{plan.national_prefix_for_parsing or plan.national_prefix or ''})?(?:{found})")


def as_written_there(groups: list[str], number: Any) -> bool:
    """Whether digits are grouped as the country does, in two groups or more."""
    import phonenumbers

    usual = re.findall(r"\d+", phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL))
    return len(groups) > 1 and groups in (usual, [str(number.country_code), *usual])


# --- addresses in networks

IPV4 = re.compile(r"\d(?<![\w.,/@-]\d)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w@-]|\.\w)")
IPV6 = re.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{3,34}(?![\w:])")
VERSION = re.compile(
    r"(?:\b(?:v|version|release|rev|build|sections?|chapters?|clauses?|figures?|tables?|steps?|[a-z]+-?version)\b|[=<>~!^]=|[~^§])"
    r"[\s:=\"'(]{0,3}$",
    re.IGNORECASE,
)
RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222", "208.67.220.220"})
LEAST_GROUPS = 3
"""Groups of digits in an IPv6 address; `2000::2` is rather a slice."""


def ips(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Public addresses, versions 4 and 6; numbers of versions and sections look the same but for the word before."""
    found = []
    for match in IPV4.finditer(text):
        if match[0] not in RESOLVERS and is_public(match[0]):
            before = VERSION.search(text, max(0, match.start() - CUE), match.start())
            if before is None:
                found.append(match.span())
    for match in IPV6.finditer(text):
        if sum(map(bool, match[0].split(":"))) >= LEAST_GROUPS and is_public(match[0]):
            found.append(match.span())
    yield from sorted(found)


def is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast


def disjoint(spans: Sequence[Span]) -> Iterator[Span]:
    """In order, without those that overlap an earlier one."""
    done = 0
    for begin, end in sorted(spans):
        if begin >= done:
            yield begin, end
            done = end


Detector = Callable[[str, Sequence[str]], Iterator[Span]]
DETECTORS: dict[str, tuple[Detector, ...]] = {
    "secret": (key_blocks, tokens, url_passwords, assignments),
    "email": (emails,),
    "iban": (ibans,),
    "card": (cards,),
    "national_id": (national_ids,),
    "phone": (phones,),
    "ip": (ips,),
}
