"""The grammar: the only place that knows how spans of text, image and speech become one stream of positions, and back.

vocabulary.py names the ids, spans.py writes and reads the arrays of documents, rules.py says what generation may do.
"""

from dina.grammar.spans import (
    ABSENT, Cost, Document, Image, Span, Speech, Text, canonical, cost, draw_delay, empty, encode, text_label, write,
)
from dina.grammar.parse import decode
from dina.grammar.vocabulary import RELEASED_SPECIALS, SPECIALS, Vocabulary, from_config, grids, released

__all__ = [
    "ABSENT", "SPECIALS", "Cost", "Document", "Image", "Span", "Speech", "Text", "Vocabulary", "canonical", "cost",
    "decode", "draw_delay", "empty", "encode", "from_config", "grids", "released", "text_label", "write",
]
