"""Texts in which English is hard to split, made at random, and real ones."""

import ast

from hypothesis import strategies as st

from tests.data import standard_library

HARD = """
the of and to Have with be that cannot dont can't He's it's Let's we'll they'd've rock'n'roll o'clock Mr. Mrs. Ph.D.
U.S.A. e.g. i.e. i.e., a.m. 10a.m. vs. etc. St. Sept. No. naïve café Straße ﬁne 日本語 Москва عربي हिन्दी self-made
well-known-to-all and/or either/or w/o C++ .NET foo.Bar foo_bar __init__ e-mail co-op re-use over- -under ’tis
“double” «guillemets» — – … .. ... .... http://example.com https://www.example.co.uk/path?query=1#top www.example.org
example.com:8080 ftp://user:pass@host.net/x a.b@example.com <a.b@example.com> 127.0.0.1 192.168.0.1 8.8.8.8 file.tar.gz
/usr/lib/python3.11 C:\\dir\\file #hashtag @handle $5 5$ US$5 A$5 €3.50 3.50€ 10% %d 1,000,000 1.5e-3 +1 -1 3-4 3*4 2^8
1/2 10:30 10km 5µm 3km/h 20°C. °F. 12GB 7m² ١٢ ² ½ v2.0 x=1 a<b a>b a:b 1:2 key=value :) :-) ;-D :( :/ <3 </3 XD xD :3
(: ): >:( :'( ^_^ (^_^) -_- o.O O_o ಠ_ಠ (ಠ_ಠ) ¯\\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*> 8) 8-D v.v :o) [: ]= 😀 👍🏽 ™ ©
. , ; : ! ? ( ) [ ] { } < > " ' ` ´ “ ” ‘ ’ „ « » - -- --- – — / \\ | _ * & # % @ ~ ^ = + … · • ¿ ¡ 。 、 ！ ？ । ۔ ؟ §
's 'S ’s 'll n't 'd a5km v2GB x_3mm. foo_5m, _a a_ a2 A1. i18n
"""
SPACES = [*" " * 12, "", "", "", "\n", "\n\n", "  ", "\t", " \n ", "\xa0", "\u2003", "\x1f", "\x85", "\u200b", "\r\n"]
characters = st.characters(exclude_categories=["Cs"])


def texts(pieces: int = 30) -> st.SearchStrategy[str]:
    """Texts of words, entities, emoticons, special cases, marks and any characters, with any white space between."""
    from spacy.lang.en.tokenizer_exceptions import TOKENIZER_EXCEPTIONS

    piece = st.one_of(
        st.sampled_from(HARD.split()),
        st.sampled_from(sorted(TOKENIZER_EXCEPTIONS)),
        st.text(characters, min_size=1, max_size=6),
        st.text("aZ0.,:;-'\"()/@°$%kms", min_size=1, max_size=8),
    )
    space = st.sampled_from(SPACES)
    return st.lists(st.tuples(piece, space).map("".join), max_size=pieces).map("".join)


def real_texts(count: int) -> list[str]:
    """Prose of the running Python, topics of its help and docstrings, and a quarter as many of its source files."""
    from pydoc_data.topics import topics

    said = []
    for source in standard_library(count):
        tree = ast.parse(source)
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        said += [text for node in nodes if (text := ast.get_docstring(node))]
    return [*list(topics.values())[: count // 2], *said[: count // 2], *standard_library(count // 4)]
