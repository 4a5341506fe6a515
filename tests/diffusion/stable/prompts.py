"""Prompts to hold a tokenizer against another: what people write, and what breaks tokenizers."""

import random
from collections.abc import Iterator

CURIOUS = (
    "",
    " ",
    " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff ",
    "a photo of an astronaut riding a horse on mars",
    "  A PHOTO   of\n\nan\tAstronaut  ",
    "rock &amp; roll &lt;b&gt; &#39;quoted&#39; &quot; &nbsp; &eacute; &#x1F600; &amp;amp; &notanentity; & ;",
    "<b>bold</b><br/><!-- no -->",
    "I'm you're she's he'd we've they'll don't DON'T I'LL 'S 'twas y'all'd've rock 'n' roll it''s '",
    "it’s ‘quoted’ “double” – en — em … ellipsis",
    "mojibake: cafÃ© â€œquotesâ€\x9d Ã¼ber",
    "café cafe\u0301 naïve na\u0131\u0308ve Å A\u030a \u212b ﬁ ﬀ ǆ ß ẞ SS ı I İ i\u0307 \u1e9b\u0323",
    "ΟΔΟΣ οδος ΣΑΣ Σ σ ς ᾳ ᾼ Ω \u2126",
    "МОСКВА Москва ЁЖ её",
    "你好世界 東京タワー カタカナ ひらがな 한국어 안녕하세요 한",
    "שלום עולם مرحبا بالعالم नमस्ते สวัสดี ვეფხის ՀԱՅԵՐԵՆ",
    "👍👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☺ ✨✨✨ 🤌🏿 1️⃣",
    "1234567890 3.14159 1,000 x² ½ Ⅷ ①② ٣٤٥ ७८९ 𝟙𝟚 ４Ｋ 8k 50mm f/1.8 iso100",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝐛𝐨𝐥𝐝 ｆｕｌｌｗｉｄｔｈ ＦＵＬＬ Ⓐⓑ",
    "!!! ??? ... --- ___ *** ((())) [[[]]] {{}} ### $$$ %%% ^^^ @user #hashtag http://example.com/a?b=c&d=e#f",
    "(masterpiece:1.2), [bad hands], BREAK, <lora:style:0.8>",
    "<|startoftext|>",
    "<|endoftext|>",
    "a<|startoftext|>b <|endoftext|> c <|STARTOFTEXT|> d <|ENDOFTEXT|> e",
    "<|endoftext|><|endoftext|> <| endoftext |> <|endoftext| |endoftext|> <|padding|>",
    "\x00 \x01\x02 \x1b[31m red \x7f \ufffd \ufffe \U0010ffff",
    "Z\u0351\u036b\u0343\u036a\u0302a\u0313\u0308\u0363l\u0348\u034ag\u0338o\u0300\u0316!",
    "zero\u200bwidth soft\u00adhyphen \u200fright \u202eoverride\u202c joiner\u200d",
    "a</w> </w> Ġ Ĝ ċ ðŁĺĢ",
    "a" * 300,
    "ab" * 200,
    "!" * 200,
    "9" * 200,
    "👍" * 60,
    "\u0301" * 100,
    "a " * 75,
    "a " * 76,
    "word " * 1000,
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
)

_WORDS = """
    a photo portrait oil painting of the cat Dog astronaut in front at sunset, highly detailed; trending on ArtStation 4k 8K HDR
    unreal-engine octane_render by Greg Rutkowski Vincent van Gogh's style cyberpunk city neon lights isn't it? Café naïve São Paulo
    Zürich Łódź Đà Nẵng İstanbul ΑΘΗΝΑ Москва 東京 서울 (very:1.3) [sketch] black&white R&amp;B &lt;3 1/2 3.5mm f/2 #art @me 100%
    she'll WE'VE o'clock rock'n'roll 🙂 👩🏽‍🚀 ❤️ 🇯🇵 … — “so” ’tis
""".split()  # noqa: SIM905
# Blocks of Unicode, to draw characters from that libraries of any age know.
BLOCKS = (
    (0x00, 0x7F),
    (0xA0, 0x24F),
    (0x250, 0x2AF),
    (0x300, 0x341),
    (0x391, 0x3A1),
    (0x3A3, 0x3CE),
    (0x400, 0x45F),
    (0x5D0, 0x5EA),
    (0x621, 0x652),
    (0x660, 0x669),
    (0x904, 0x939),
    (0x966, 0x96F),
    (0xE01, 0xE30),
    (0x1E00, 0x1E95),
    (0x1EA0, 0x1EF9),
    (0x1F00, 0x1F15),
    (0x2000, 0x2027),
    (0x2028, 0x202F),
    (0x2030, 0x205F),
    (0x20A0, 0x20AC),
    (0x2100, 0x2138),
    (0x2153, 0x2182),
    (0x2190, 0x21FF),
    (0x2460, 0x24EA),
    (0x2600, 0x266F),
    (0x3000, 0x3020),
    (0x3041, 0x3094),
    (0x30A1, 0x30FE),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0xFE00, 0xFE0F),
    (0xFF01, 0xFF5E),
    (0x1D400, 0x1D454),
    (0x1F300, 0x1F320),
    (0x1F601, 0x1F610),
)


def prompts(count: int, seed: int) -> Iterator[str]:
    """The curious ones, then others drawn at random: words, characters of some blocks of Unicode, of all of it, and mixtures."""
    yield from CURIOUS[:count]
    rng = random.Random(seed)

    def word() -> str:
        return rng.choice(_WORDS)

    def block() -> str:
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))

    def anything() -> str:
        points = (rng.choice((rng.randint(0, 0xFFFF), rng.randint(0, 0x10FFFF))) for _ in range(rng.randint(1, 6)))
        return "".join(chr(point) for point in points if not 0xD800 <= point <= 0xDFFF)

    def ascii_run() -> str:
        return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 12)))

    for _ in range(count - len(CURIOUS)):
        kinds = rng.choice(((word,), (word,), (block,), (ascii_run,), (anything,), (word, block, ascii_run, anything)))
        longest = 120 if rng.random() < 0.05 else 20
        yield rng.choice((" ", " ", "", "  ", "\n")).join(rng.choice(kinds)() for _ in range(rng.randint(1, longest)))
