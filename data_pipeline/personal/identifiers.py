"""Numbers that states give to their people."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from data_pipeline.personal.spans import Span, cued


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
