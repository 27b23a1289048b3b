"""Names in archives whose code page nobody wrote down.

A zip says of a name only whether it is UTF-8; without that mark it should be code page 437 (PKWARE,
APPNOTE.TXT, appendix D). Programs on Windows write the code page of their language instead, and
tars hold bytes. The names are short and few, on which charset-normalizer and its like are no better
than chance, so that the words expected in these archives decide first.
"""

import re
from collections.abc import Iterator, Sequence

_WORDS = {
    "gb18030": "细胞 淋巴 单核 中性 嗜酸 嗜碱 血小板 红系 幼粒 训练 测试 验证 图像 图片 涂片 数据",
    "big5": "細胞 淋巴 單核 嗜中性 嗜酸 嗜鹼 血小板 血球 訓練 測試 驗證 圖像 影像 資料",
    "cp932": "細胞 リンパ 単球 好中球 好酸球 好塩基球 赤芽球 血小板 訓練 検証 テスト 画像 データ",
    "cp949": "세포 림프 단핵 호중구 호산구 호염기구 적혈구 적아구 혈소판 훈련 검증 시험 이미지",
    "cp866": "фил цит клетк бласт обуч тест изображ",
    "cp1251": "фил цит клетк бласт обуч тест изображ",
}

# The common characters of a code page, as bytes: those outside do not occur in names. GB 2312 and
# JIS X 0208 have their common Chinese characters in a first part, as Big5; KS X 1001 its Hangul.
_COMMON = {
    "gb18030": rb"(?:[\xb0-\xd7\xa1\xa3][\xa1-\xfe]|[\0-\x7f])*",
    "big5": rb"(?:[\xa4-\xc6\xa1][\x40-\x7e\xa1-\xfe]|[\0-\x7f])*",
    "cp932": rb"(?:[\x81-\x83\x88-\x97][\x40-\x7e\x80-\xfc]|[\0-\x7f])*",
    "cp949": rb"(?:[\xb0-\xc8\xa1\xa3][\xa1-\xfe]|[\0-\x7f])*",
}
# Each Hangul is a common Chinese character of GB 2312, too, and six tenths of those are Hangul.
_ENOUGH = 6  # different ones, which Chinese names have by chance in 1 of 20 archives

_LATIN = {
    "cp850": "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÖÜøØáíóúñÑßãõÁÂÀÓ",
    "cp1252": "ÀÁÂÃÄÅÆÇÈÉÊËÍÎÏÑÓÔÕÖØÚÛÜŒßàáâãäåæçèéêëìíîïñòóôõöøùúûüœ",
}
_LETTERS = 4  # at least, of names that are taken for Russian
# In small letters, with a capital before them, or in capitals.
_RUSSIAN = re.compile(r"[\u0410-\u042f\u0401]?[\u0430-\u044f\u0451]+|[\u0410-\u042f\u0401]+")


def decode_names(names: Sequence[bytes | str]) -> list[str]:
    """The names of an archive as text, all of them from one code page; text stays what it is.

    That is the code page of Chinese, Japanese, Korean or Russian programs in which there are words
    of this field; else UTF-8 if all names can be that; else the code page of those programs, or of
    West European ones, if only one is possible; else code page 437, as zips should be.
    """
    page = _code_page([name for name in names if isinstance(name, bytes) and not name.isascii()])
    return [name if isinstance(name, str) else name.decode(page) for name in names]


def _code_page(names: Sequence[bytes]) -> str:
    joined = b"\n".join(names)
    texts = dict(_decoded(joined))
    # Before UTF-8, which some Chinese words are by chance.
    found = {page: _count_words(text, page) for page, text in texts.items()}
    if any(found.values()):
        return max(found, key=found.__getitem__)
    if "utf-8" in texts:
        return "utf-8"
    for page, letters in _LATIN.items():
        if page in texts and _is_latin(texts[page], letters):
            return page
    possible = [p for p in _WORDS if p in texts and _is_common(joined, texts[p], p)]
    if (
        len(possible) > 1
        and "cp949" in possible
        and len(set(re.findall(r"[^\0-\x7f]", texts["cp949"]))) >= _ENOUGH
    ):
        return "cp949"
    return possible[0] if len(possible) == 1 else "cp437"


def _decoded(joined: bytes) -> Iterator[tuple[str, str]]:
    for page in ("utf-8", *_WORDS, *_LATIN):
        try:
            yield page, joined.decode(page)
        except UnicodeDecodeError:
            continue


def _count_words(text: str, page: str) -> int:
    folded = text.casefold()
    return sum(word in folded for word in _WORDS.get(page, "").split())


def _is_latin(text: str, letters: str) -> bool:
    """Whether the letters with accents are some of a language, fewer than the others of their
    word, and in its case: not a capital behind a small letter, nor small behind capitals."""
    for word in _foreign_words(text):
        accented = [letter for letter in word if not letter.isascii()]
        if len(accented) > len(word) / 2 or not set(accented) <= set(letters):
            return False
        for at, letter in enumerate(word[1:], 1):
            before = word[at - 1]
            changes = before.islower() if letter.isupper() else at > 1 and before.isupper()
            if changes and letter in accented:
                return False
    return True


def _is_common(joined: bytes, text: str, page: str) -> bool:
    """Whether names hold only what is common in a code page that is not West European."""
    if page in _COMMON:
        return re.fullmatch(_COMMON[page], joined) is not None
    words = _foreign_words(text)
    return sum(map(len, words)) >= _LETTERS and all(map(_RUSSIAN.fullmatch, words))


def _foreign_words(text: str) -> list[str]:
    words = re.findall(r"(?:[a-zA-Z]|[^\0-\x7f])+", text)
    return [word for word in words if not word.isascii()]
