"""Mending, language, addresses and code: each step against datatrove's block where there is one."""

import base64
import random
import re
import shutil
import socket
import time
from pydoc_data.topics import topics

import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.ngram import train
from data_pipeline.page import Page
from data_pipeline.steps.code_quality import CodeQuality
from data_pipeline.steps.ftfy import Ftfy
from data_pipeline.steps.language import Language
from data_pipeline.steps.perplexity import Perplexity
from data_pipeline.steps.pii import PII
from data_pipeline.steps.representation import Representation
from data_pipeline.steps.toxicity import Toxicity
from data_pipeline.steps.url import Url
from tests.data import standard_library
from tools.yardstick import language_filter

SENTENCES = {
    "en": "The weather was fine, and all of them went down to the river to see the boats come in.",
    "de": "Das Wetter war schön, und alle gingen zum Fluss hinunter, um die Boote ankommen zu sehen.",
    "fr": "Il faisait beau, et tous descendirent vers la rivière pour voir arriver les bateaux.",
    "es": "Hacía buen tiempo y todos bajaron al río para ver llegar los barcos.",
    "ru": "Погода была хорошая, и все пошли к реке посмотреть, как приходят лодки.",
    "zh": "天气很好，大家都到河边去看船来。",
    "ar": "كان الطقس جميلا وذهبوا جميعا إلى النهر لرؤية القوارب.",
}


def page(text: str, **metadata) -> Page:
    return Page(text, "id", metadata)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))


# --- ftfy


@pytest.mark.parametrize(
    "text", ["schÃ¶n und grÃ¼n", "It&rsquo;s &lt;b&gt;", "a\x1b[31mred\x1b[0m", "ﬁne “quotes”", "ｆｕｌｌ", "plain"]
)
def test_ftfy_mends_what_datatroves_formatter_mends(text):
    from datatrove.pipeline.formatters.ftfy import FTFYFormatter

    ours = page(text)
    assert Ftfy().judge(ours) is None
    assert ours.text == FTFYFormatter().format(text)
    assert ours.counts["mended"] == (ours.text != text)


def test_ftfy_leaves_typography_alone_unless_asked():
    ours = page("ﬁne “quotes”")
    Ftfy(ligatures=True, quotes=True).judge(ours)
    assert ours.text == 'fine "quotes"'
    assert {problem.key for problem in Ftfy(entities="yes").problems("k")} == {"k.entities"}


# --- language


def test_decisions_of_language_are_those_of_datatrove_with_the_same_model(offline):
    mixed = [f"{one}\n{two}" for one in SENTENCES.values() for two in SENTENCES.values()]
    texts = [
        *mixed,
        *[text[:300] for text in topics.values()],
        *[text[:200] for text in standard_library(30)],
        "",
        "\n",
        "1 2 3",
        "\0",
    ]
    for languages, threshold in ((["en"], 0.65), (["de", "fr"], 0.3), ([], 0.65), ([], 0.9)):
        theirs = language_filter(languages or None, threshold)
        step = Language(languages=languages, threshold=threshold)
        dropped = 0
        for text in texts:
            document, ours = Document(text=text, id="id"), page(text)
            kept = bool(theirs.filter(document))
            assert (step.judge(ours) is None) == kept, text
            assert ours.metadata["language"] == document.metadata["language"]
            assert ours.metadata["language_score"] == pytest.approx(document.metadata["language_score"])
            dropped += not kept
        assert 0 < dropped < len(texts)


def test_language_is_told_counted_and_written_down_without_a_connection(offline):
    step = Language(threshold=0.0)
    for code, sentence in SENTENCES.items():
        ours = page(sentence)
        assert step.judge(ours) is None
        assert ours.metadata["language"] == code
        assert ours.counts == {code: 1}
    assert Language(languages=["de"]).judge(page(SENTENCES["en"])) == "language"


def test_language_refuses_a_code_or_a_file_that_is_not_there(tmp_path):
    (problem,) = Language(languages=["en", "english"]).problems("corpus.steps.language")
    assert problem.key == "corpus.steps.language.languages"
    assert problem.found == "english"
    assert "zh" in problem.fix
    (tmp_path / "text.bin").write_text("no model")
    (problem,) = Language(languages=["en"], model=str(tmp_path / "text.bin")).problems("k")
    assert problem.key == "k.model"
    (problem,) = Language(model=str(tmp_path / "none.bin")).problems("k")
    assert problem.key == "k.model"


def test_another_model_file_is_another_state(tmp_path):
    shutil.copy(Language().file, tmp_path / "same.ftz")
    assert Language(model=str(tmp_path / "same.ftz")).state() == Language().state()
    (tmp_path / "same.ftz").write_bytes(b"other")
    assert Language(model=str(tmp_path / "same.ftz")).state() != Language().state()


# --- url

LISTS = {
    "domains": ["bad.com", "worse.co.uk", "sub.fine.org"],
    "words": ["casino"],
    "soft_words": ["hot", "girls", "free"],
    "parts": ["spam-farm"],
}
URLS = {
    "https://bad.com/a": "domain",
    "http://www.BAD.com": "domain",
    "https://deep.sub.worse.co.uk/?q=1": "domain",
    "https://notbad.com/": None,
    "https://fine.org/": None,
    "https://sub.fine.org/x": "domain",
    "https://fine.org/casino/1": "word",
    "https://fine.org/casinos": None,
    "https://fine.org/hot-stuff": None,
    "https://fine.org/hot-girls": "soft_words",
    "https://fine.org/the_spam_farm_.html": "part",
    "fine.org/no/scheme": None,
    "https://[broken/": None,
}


def test_addresses_are_judged_as_datatrove_does():
    from datatrove.pipeline.filters.url_filter import URLFilter
    from tldextract import TLDExtract

    theirs = URLFilter(
        extra_domains=LISTS["domains"],
        banned_words=LISTS["words"],
        soft_banned_words=LISTS["soft_words"],
        banned_subwords=LISTS["parts"],
        use_integrated_lists=False,
    )
    theirs.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)
    names = {
        "domain": "domain",
        "subdomain": "domain",
        "hard_blacklisted": "word",
        "soft_blacklisted": "soft_words",
        "blacklisted_subword": "part",
    }
    step = Url(**LISTS)
    for url, expected in URLS.items():
        assert step.judge(page("text", url=url)) == expected, url
        result = theirs.filter(Document(text="text", id="id", metadata={"url": url.lower()}))
        assert (names[result[1]] if isinstance(result, tuple) else None) == expected, url


def test_a_document_without_an_address_passes_and_is_counted():
    ours = page("text", url="")
    assert Url(**LISTS).judge(ours) is None
    assert ours.counts == {"no_url": 1}


def test_lists_may_be_in_files_and_a_changed_file_is_another_state(tmp_path):
    (tmp_path / "domains.txt").write_text("# adult\nbad.com\n\n")
    step = Url(files={"domains": str(tmp_path / "domains.txt")}, patterns=[r"/tag/\d+$"], urls=["https://a.org/x"])
    assert step.problems("k") == []
    assert step.judge(page("text", url="https://a.bad.com/")) == "domain"
    assert step.judge(page("text", url="https://a.org/tag/12")) == "pattern"
    assert step.judge(page("text", url="https://a.org/x")) == "url"
    before = step.state()
    (tmp_path / "domains.txt").write_text("worse.com\n")
    assert step.state() != before


def test_lists_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.org")
    latin = Url(files={"domains": str(tmp_path / "latin.txt")})
    assert {p.key for p in latin.problems("k")} == {"k.files.domains"}
    assert {p.key for p in Url().problems("k")} == {"k"}
    assert {p.key for p in Url(patterns=["("]).problems("k")} == {"k.patterns"}
    files = {"domain": "x", "words": str(tmp_path / "none")}
    assert {p.key for p in Url(files=files, most_soft_words=0).problems("k")} == {
        "k.files",
        "k.files.words",
        "k.most_soft_words",
    }


@pytest.mark.slow
def test_the_packaged_lists_hold_millions_of_sites():
    step = Url(packaged=True)
    assert len(step.hashed_domains) > 4_000_000
    assert step.judge(page("text", url="https://www.pornhub.com/")) == "domain"
    assert step.judge(page("text", url="https://www.python.org/doc/")) is None


# --- code


def test_nearly_all_of_the_standard_library_is_code_that_people_wrote():
    texts = [text for text in standard_library(150) if text]
    step = CodeQuality()
    verdicts = [step.judge(page(text)) for text in texts]
    assert sum(verdict is None for verdict in verdicts) >= 0.97 * len(texts)
    assert {verdict for verdict in verdicts if verdict} <= {"generated"}


def code_that_is(fault: str) -> str:
    rng = random.Random(0)
    code = standard_library(5)[3]
    blob = base64.b64encode(rng.randbytes(3000)).decode()
    return {
        "long_line": code + "x = '" + "ab " * 400 + "'",
        "line_length": "\n".join(f"value_{n} = some_function(argument, {n}) " * 4 for n in range(50)),
        "many_lines": "x = 1\n" * 100_001,
        "few_letters": "+-*/=(){}; ." * 8 + "\n",
        "generated": "# This file was generated by a tool. DO NOT EDIT.\n" + code,
        "encoded": code[:1000]
        + "\nDATA = (\n"
        + "\n".join(f'    "{blob[at : at + 76]}"' for at in range(0, 4000, 76))
        + ")\n",
        "data": code[:500]
        + "\nTABLE = [\n"
        + "".join(f"    {rng.random():.6f}, {rng.random():.6f},\n" for _ in range(200))
        + "]\n",
        "minified": "\n".join("function(a,b){return(a+b)*this.c||d(e)};var" * 2 for _ in range(30)),
    }[fault]


@pytest.mark.parametrize(
    "fault", ["long_line", "line_length", "many_lines", "few_letters", "generated", "encoded", "data", "minified"]
)
def test_the_reason_names_what_is_wrong_with_code(fault):
    assert CodeQuality().judge(page(code_that_is(fault))) == fault


def test_each_rule_of_code_can_be_switched_off():
    off = CodeQuality(
        line_length=1e9,
        longest_line=10**9,
        most_lines=0,
        alphanumeric=0,
        letters=0,
        white_space=0,
        longest_blob=0,
        blobs=1,
        numbers=1,
        generated=False,
    )
    for fault in ("long_line", "line_length", "many_lines", "few_letters", "generated", "encoded", "data", "minified"):
        assert off.judge(page(code_that_is(fault))) is None
    assert off.problems("k") == []
    assert {p.key for p in CodeQuality(letters=2, longest_line=0).problems("k")} == {"k.letters", "k.longest_line"}


def test_escapes_and_hexadecimal_strings_are_encoded_data():
    rng = random.Random(0)
    code = standard_library(5)[3][:300]
    lines = "\n".join('"' + "".join(f"\\x{byte:02x}" for byte in rng.randbytes(20)) + '"' for _ in range(20))
    assert CodeQuality().judge(page(f"{code}\ndata = (\n{lines}\n)")) == "encoded"
    assert CodeQuality().judge(page(f"{code}\nkey = '{rng.randbytes(500).hex()}'")) in ("encoded", "long_line")
    assert re.search("sha256", code) is None
    assert CodeQuality().judge(page(f"{code}\nsha256 = '{rng.randbytes(32).hex()}'")) is None


@pytest.mark.parametrize("unit", ["ab ", "1 ", "1,", "A", "\\x0", "\\u00e9", "a" * 63 + " ", "a" * 50 + "\n", '"ab" '])
def test_time_of_code_quality_grows_with_the_length_whatever_the_text(unit):
    def seconds(length: int) -> float:
        ours = page(unit * (length // len(unit)))
        begin = time.process_time()
        CodeQuality(longest_line=10**9, line_length=10**9, generated=False, alphanumeric=0).judge(ours)
        return time.process_time() - begin

    assert min(seconds(80_000) for _ in range(3)) < 8 * min(seconds(20_000) for _ in range(3)) + 0.02


# --- any text

ANY = st.text(st.characters(), max_size=60) | st.text("aA1 .@:/-+()\n\\xu{}=\"'\ud800\x00é中", max_size=200)


@settings(max_examples=100, deadline=None)
@given(ANY, ANY)
def test_no_text_and_no_address_breaks_a_step(steps_of_any_text, text, url):
    for step in steps_of_any_text:
        verdict = step.judge(page(text, url=url, source="s", kind="prose"))
        assert verdict is None or re.fullmatch("[a-z_]+", verdict)


@pytest.fixture(scope="module")
def steps_of_any_text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ngram")
    train(list(topics.values())[:3], 4).save(directory / "ngram.npz")
    urls = Url(**LISTS, patterns=["x+y"], urls=["https://a.org"])
    return [
        *(Ftfy(), Language(), urls, CodeQuality(), PII(), Toxicity(), Representation()),
        Perplexity(model=str(directory), most=5),
    ]
