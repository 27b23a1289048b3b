"""Names in the code pages of the programs that packed them."""

import pytest

from bloodcell_fastai.data.code_pages import decode_names


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("utf-8", ["细胞/1.jpg", "Größe", "Лимфоцит"]),
        ("gbk", ["嗜酸性粒细胞", "中性粒细胞", "淋巴细胞", "单核细胞"]),
        ("gbk", ["淋巴"]),
        ("gbk", ["图片"]),  # whose bytes are two letters in UTF-8
        ("gbk", ["张三", "李四"]),
        ("gbk", ["样本1/1.jpg", "样本2/1.jpg"]),
        ("gb18030", ["T细胞", "训练集"]),
        ("big5", ["淋巴球", "單核球", "嗜中性球"]),
        ("big5", ["健康", "病人"]),
        ("cp932", ["好酸球", "好中球", "リンパ球", "単球"]),
        ("cp932", ["好酸球"]),
        ("cp932", ["新しいフォルダー"]),
        ("cp949", ["호산구", "호중구", "림프구", "단핵구"]),
        ("cp949", ["호산구"]),
        ("cp949", ["정상", "백혈병", "환자"]),
        ("cp866", ["Эозинофил", "Лимфоцит"]),
        ("cp866", ["ЛИМФОЦИТЫ"]),
        ("cp866", ["Новая папка"]),
        ("cp1251", ["Эозинофил", "Лимфоцит"]),
        ("cp1251", ["ЛИМФОЦИТЫ"]),
        ("cp1251", ["Здоровые", "Больные"]),
        ("cp437", ["Éosinophile", "Lymphozyt-Größe"]),
        ("cp850", ["Éosinophile", "Lymphozyt-Größe"]),
        ("cp850", ["eosinófilo", "linfócito", "não"]),
        ("cp850", ["EOSINÓFILO"]),
        ("cp1252", ["Éosinophile", "Lymphozyt-Größe"]),
        ("cp1252", ["éosinophile"]),
        ("cp1252", ["GRÖSSE", "NEUTRÓFILO"]),
    ],
)
def test_names_in_the_code_page_of_a_language(page, names):
    assert decode_names([name.encode(page) for name in names]) == names


def test_one_name_decides_for_the_others():
    """So does that of a class for what is in no list of words."""
    names = ["ЖУК", "Лимфоцит", "a/1.jpg"]
    for page in ("cp866", "cp1251"):
        assert decode_names([name.encode(page) for name in names]) == names


def test_text_stays_what_it_is():
    assert decode_names(["Größe", "淋巴".encode("gbk")]) == ["Größe", "淋巴"]


@pytest.mark.parametrize("raw", [b"\xff\xfe\x01", b"\xb0", b"\xbb\xf5", bytes(range(1, 256))])
def test_what_is_not_clear_is_code_page_437(raw):
    assert decode_names([raw]) == [raw.decode("cp437")]


def test_an_ambiguous_name_is_not_guessed():
    """Two Hangul are two common Chinese characters as well."""
    raw = "새폴더".encode("cp949")
    assert decode_names([raw]) == [raw.decode("cp437")]
