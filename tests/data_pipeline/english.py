"""Texts in which English is hard to split, made at random, and real ones."""

import ast
import sysconfig
from pathlib import Path

from hypothesis import strategies as st

from tests.data import standard_library

WORDS = """the of and to Have with be that cannot dont can't He's it's Let's we'll they'd've rock'n'roll o'clock Mr. Mrs. Ph.D.
    U.S. U.S.A. e.g. i.e. i.e., a.m. 10a.m. vs. etc. St. Sept. No. naïve café Straße ﬁne 日本語 Москва عربي हिन्दी self-made well-known-to-all
    and/or either/or w/o C++ .NET foo.Bar foo_bar __init__ e-mail co-op re-use over- -under ’tis ‘quoted’ “double” «guillemets» — – … .. ... ....""".split()
ENTITIES = """http://example.com https://www.example.co.uk/path?query=1#top www.example.org/a.b example.com:8080 ftp://user:pass@host.net/x
    a.b@example.com <a.b@example.com> 127.0.0.1 192.168.0.1 8.8.8.8 file.tar.gz /usr/lib/python3.11 C:\\dir\\file #hashtag @handle $5 5$ US$5 A$5
    €3.50 3.50€ 10% %d 1,000,000 1.5e-3 +1 -1 3-4 3*4 2^8 1/2 10:30 10km 5µm 3km/h 20°C. °F. 12GB 7m² ١٢ ² ½ v2.0 x=1 a<b a>b a:b 1:2 key=value""".split()
EMOTICONS = """:) :-) ;-D :( :/ <3 </3 XD xD :3 =) (: ): >:( :'( ^_^ (^_^) -_- o.O O_o ಠ_ಠ (ಠ_ಠ) ¯\\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*> 8) 8-D v.v :o) [: ]= 😀 👍🏽 ™ ©""".split()
MARKS = ". , ; : ! ? ( ) [ ] { } < > \" ' ` ´ “ ” ‘ ’ „ « » - -- --- – — / \\ | _ * & # % @ ~ ^ = + … · • ¿ ¡ 。 、 ！ ？ । ۔ ؟ § 's 'S ’s 'll n't 'd".split()
SPACES = [" "] * 12 + ["", "", "", "\n", "\n\n", "  ", "\t", " \n ", "\xa0", "\u2003", "\u3000", "\x1f", "\x85", "\u200b", "\r\n", "\u2028"]
characters = st.characters(exclude_categories=["Cs"])


def texts(pieces: int = 30) -> st.SearchStrategy[str]:
    """Texts of words, entities, emoticons, special cases, marks and any characters, with any white space between."""
    from spacy.lang.en.tokenizer_exceptions import TOKENIZER_EXCEPTIONS

    piece = st.one_of(
        st.sampled_from(WORDS),
        st.sampled_from(ENTITIES),
        st.sampled_from(EMOTICONS),
        st.sampled_from(MARKS),
        st.sampled_from(sorted(TOKENIZER_EXCEPTIONS)),
        st.text(characters, min_size=1, max_size=6),
        st.text("aZ0.,:;-'\"()/@°$%kms", min_size=1, max_size=8),
    )
    space = st.sampled_from(SPACES)
    return st.lists(st.tuples(piece, space).map("".join), max_size=pieces).map("".join)


def real_texts(count: int) -> list[str]:
    """Documentation of the running Python: what its modules say of themselves, its topics, and source files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    modules = [ast.parse(file.read_bytes()) for file in files[: 3 * count]]
    said = [ast.get_docstring(node, clean=True) for module in modules for node in [module, *classes_of(module)]]
    from pydoc_data.topics import topics

    prose = [text for text in [*topics.values(), *said] if text]
    return [*prose[:count], *standard_library(count // 4)]


def classes_of(module: ast.Module) -> list[ast.ClassDef | ast.FunctionDef]:
    return [node for node in ast.walk(module) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
