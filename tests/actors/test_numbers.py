import math
from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.numbers import (
    MAX_CHARACTERS,
    Number,
    computable,
    days_apart,
    find_days,
    find_numbers,
    number_from,
    number_text,
    numbers_match,
    parse_number,
    rounding,
)

DECIMALS = st.decimals(-(10**9), 10**9, places=3)
NUMBERISH = st.text(alphabet="0123456789.,+-*/()eE%$£ \n=kmbillionthousandpercent\\{}−–×", max_size=60)


def full(text: str) -> Decimal | None:
    number = parse_number(text)
    return None if number is None else number.full


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", "12"),
        (" 12. ", "12"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("–5", "-5"),
        ("+5", "5"),
        (".5", "0.5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("$ 2,620", "2620"),
        ("1,234,567.89", "1234567.89"),
        ("1,00,000", "100000"),
        ("1.5e3", "1500"),
        ("1e-5", "0.00001"),
        ("(0.4)", "-0.4"),
        ("(-5)", "-5"),
        ("$(1,234) million", "-1234000000"),
        ("£(8.1m)", "-8100000"),
        ("(5.93%)", "-0.0593"),
        ("(5)%", "-0.05"),
        ("12.5%", "0.125"),
        ("12.5 per cent", "0.125"),
        ("12 percentage points", "0.12"),
        ("2 thousand", "2000"),
        ("2 hundred thousand", "200000"),
        ("US$ 15.9 million", "15900000"),
        ("5 million dollars per share", "5000000"),
        ("25 days", "25"),
        ("386.1p", "386.1"),
        ("**12**", "12"),
        ("$12$", "12"),
        ("12.5\\%", "0.125"),
        ("1{,}234", "1234"),
        ("\\text{USD }5", "5"),
        ("\\frac{1}{2}", "0.5"),
    ],
)
def test_grammar(text: str, value: str) -> None:
    assert full(text) == Decimal(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("601,256-510,762", "90494"),
        ("2 + 3", "5"),
        ("5 - -3", "8"),
        ("7.6-(-2.3)", "9.9"),
        ("7.6-(2.3)", "5.3"),
        ("2 × 3", "6"),
        ("3/4", "0.75"),
        ("$5 - $3", "2"),
        ("1/2%", "0.005"),
    ],
)
def test_one_operator(text: str, value: str) -> None:
    assert full(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "abc",
        "9**9**9",
        "9^9",
        "2*3*4",
        "1/0",
        "0/0",
        "1e999999999",
        "1e100",
        "1" * 10_000,
        "1+" * 5_000,
        "(" * 10_000,
        "__import__('os').system('true')",
        "0x10",
        "1_000",
        "٣",
        "5²",
        "1½",
        "nan",
        "inf",
        "--5",
        "5-",
        "5–7",
        "12,34",
        "1,234,56",
        "3.5.1",
        "2025-12-19",
        "5 apples",
        "5th",
        "million",
        "$",
        "%",
        "5 and 6",
    ],
)
def test_everything_else_is_no_number(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "unit",
    [" ", "(", "1,", "1/1", "-", "$", "m ", "million", "\\frac{", "\\text{", "per ", "usd", "*", "1e9"],
)
@pytest.mark.parametrize("head", ["", "5"])
@pytest.mark.parametrize("tail", ["", "!"])
def test_repetition_ends(head: str, unit: str, tail: str) -> None:
    text = head + unit * MAX_CHARACTERS + tail
    for read in (parse_number, number_text, find_numbers):
        read(text[:MAX_CHARACTERS])
        read(text)


@given(st.one_of(st.text(), NUMBERISH))
def test_never_raises(text: str) -> None:
    parse_number(text)
    numbers_match(text, text)
    find_numbers(text)
    find_days(text)
    named = number_text(text)
    assert named is None or parse_number(named) is not None


@given(st.one_of(st.text(), NUMBERISH))
def test_number_text_is_a_fixed_point(text: str) -> None:
    named = number_text(text)
    assert named is None or number_text(named) == named


@given(DECIMALS)
def test_written_numbers_are_read(value: Decimal) -> None:
    accounting = f"({abs(value):,})" if value < 0 else f"{value:,}"
    for text in (str(value), f"{value:,}", accounting, f"{value} million", f"${value}"):
        number = parse_number(text)
        assert number is not None
        assert number.value == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("12", "12"),
        (12, "12"),
        (-0.25, "-0.25"),
        (1e22, "1e22"),
        (1e-7, "1e-7"),
        (True, None),
        (None, None),
        ([1], None),
        (math.nan, None),
        (math.inf, None),
        (1e300, None),
    ],
)
def test_json_values(value: object, expected: str | None) -> None:
    assert number_from(value) == (None if expected is None else Number(Decimal(expected)))


def test_an_integer_too_long_to_print() -> None:
    assert number_from(10**10_000) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("about 12.5 percent of sales in 2019", "12.5 percent"),
        ("$1,234 million (see note 3)", "$1,234 million"),
        ("100 - 20 = 80", "80"),
        ("x = 5", "5"),
        ("3/4 of it", "3/4"),
        ("**12** million", "12 million"),
        ("-7, not 8", "-7"),
        ("(5)%, a loss", "(5)%"),
        ("9**9**9", None),
        ("2 + 3 + 4", None),
        ("COVID19", None),
        ("5th", None),
        ("9" * 10_000, None),
        ("unclear", None),
    ],
)
def test_the_number_that_a_text_names(text: str, named: str | None) -> None:
    assert number_text(text) == named


@pytest.mark.parametrize(
    ("answer", "reference", "match"),
    [
        ("100", "100.15", True),
        ("100.15", "100", True),
        ("100", "100.16", False),
        ("100.16", "100", False),
        ("1,234", "1234", True),
        ("0.2", "0.2004", False),
        ("0.0004", "0.0001", False),
        ("12.5", "1250", False),
        ("12.5%", "0.125", True),
        ("0.125", "12.5%", True),
        ("12.5 percent", "12.5", True),
        ("12.5", "12.5%", True),
        ("12.5%", "1250", False),
        ("12.5%", "0.125%", False),
        ("2 thousand", "2000", True),
        ("2 thousand", "2", True),
        ("2 thousand", "0.002 million", True),
        ("2 thousand", "2 million", False),
        ("2", "2000", False),
        ("2000", "2", False),
        ("7", "-700", False),
        ("-5", "5", False),
        ("5", "(5)", False),
        ("-5", "(5)", True),
        ("0", "0", True),
        ("1e-9", "0", True),
        ("2e-9", "0", False),
        ("0", "1e-9", False),
        ("2018", "2019", False),
        ("2018", "2018", True),
        ("2,018", "2,019", True),
        ("x", "x", False),
        ("", "", False),
        ("unknown", "999999999", False),
    ],
)
def test_numbers_match(answer: str, reference: str, match: bool) -> None:
    assert numbers_match(answer, reference) is match


@given(DECIMALS, DECIMALS)
def test_match_follows_the_tolerance(answer: Decimal, reference: Decimal) -> None:
    assume(reference != 0 and not 1900 <= abs(reference) < 2100)
    expected = abs(answer - reference) <= Decimal("0.0015") * abs(reference)
    assert numbers_match(str(answer), str(reference)) is expected


@given(DECIMALS, DECIMALS, st.integers(-6, 6))
def test_match_is_free_of_scale_and_of_a_common_sign(answer: Decimal, reference: Decimal, power: int) -> None:
    assume(answer != 0 and reference != 0)
    expected = numbers_match(f"{answer}e0", f"{reference}e0")
    assert numbers_match(f"{answer}e{power}", f"{reference}e{power}") is expected
    assert numbers_match(f"{-answer}e0", f"{-reference}e0") is expected


@given(DECIMALS)
def test_signs_count(value: Decimal) -> None:
    assume(value != 0)
    assert numbers_match(str(value), str(value))
    assert not numbers_match(str(-value), str(value))


def test_numbers_of_a_text() -> None:
    text = "Sales rose 14% to $15.5 billion in 2018-2019 | (219,094) | 8.\nPEP 8, 3.7.1, the 5th, -2.5 and 1e3."
    expected = ["14", "0.14", "15.5", "15500000000", "2018", "2019", "-219094", "8", "8", "-2.5", "1000"]
    assert find_numbers(text) == list(map(Decimal, expected))


def test_days_of_a_text() -> None:
    first, *_, last = find_days("on 2019-03-01, 5 March 2019, and March 31, 2019; not 2019-13-01 or 12019-03-01")
    assert last - first == 30
    assert days_apart(Decimal(30), [first, last])
    assert days_apart(Decimal(-30), [first, last])
    assert not days_apart(Decimal("30.5"), [first, last])
    assert not days_apart(Decimal(0), [first, last])


@pytest.mark.parametrize(("text", "half"), [("12", "0.5"), ("12.0", "0.05"), ("0.08", "0.005"), ("1e5", "0.5")])
def test_rounding(text: str, half: str) -> None:
    assert rounding(Decimal(text)) == Decimal(half)


@pytest.mark.parametrize(
    ("value", "numbers", "follows"),
    [
        ("8", "8 100", True),
        ("-8", "8 100", True),
        ("108", "8 100", True),
        ("92", "8 100", True),
        ("800", "8 100", True),
        ("54", "8 100", True),
        ("12.5", "8 100", True),
        ("0.08", "8 100", True),
        ("-0.92", "8 100", True),
        ("1150", "8 100", True),
        ("-92", "8 100", True),
        ("90494", "601256 510762", True),
        ("-5.934", "4785.7 5087.6", True),
        ("16", "8 100", False),
        ("64", "8 100", False),
        ("4", "8 100", False),
        ("1", "8 100", False),
        ("0", "8 100", False),
        ("0", "8 8", True),
        ("16", "8 8", True),
        ("203.667", "550 33 28", True),
        ("-1161.333", "-2235 -6986 5737", True),
        ("611", "550 33 1 28", False),
        ("5", "", False),
    ],
)
def test_computable(value: str, numbers: str, follows: bool) -> None:
    assert computable(Decimal(value), [Decimal(n) for n in numbers.split()], 0.0005) is follows


def test_computable_bears_extreme_numbers() -> None:
    extreme = [Decimal("1e600"), Decimal("1e300"), Decimal("1e-300"), Decimal(0), Decimal(3)]
    assert not computable(Decimal("7.5"), extreme, 0.05)
    assert not computable(Decimal("1e600"), extreme, 0.05)
    assert not computable(Decimal("nan"), extreme, 0.05)


@given(st.lists(DECIMALS, min_size=2, max_size=30), st.data())
def test_what_is_computed_from_two_is_computable(numbers: list[Decimal], data: st.DataObject) -> None:
    numbers = [number or Decimal(1) for number in numbers]
    i, j = data.draw(st.lists(st.integers(0, len(numbers) - 1), min_size=2, max_size=2, unique=True))
    a, b = abs(numbers[i]), abs(numbers[j])
    results = [a, a + b, a - b, a * b, (a + b) / 2]
    if a > 1 and b > 1:
        results += [a / b, 100 * a / b, (a - b) / b, 100 * (a - b) / b]
    assert all(computable(result, numbers, 1e-6) for result in results)
