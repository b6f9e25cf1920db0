"""De-identified notes: what is replaced, what stays, where everything stood, and whole runs that leave nothing."""

import csv
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.retriever.pattern import Searcher
from actors.retriever.retriever import RetrieverActor
from launch import main
from methods import phenotyping
from methods.phenotyping_definition import read_definitions
from methods.phenotyping_deidentify import (
    DeidentifyConfig,
    Stage,
    apart,
    composed,
    deidentified,
    edited,
    edits_of,
    kept_stage,
    stage_of,
)
from methods.phenotyping_fhir import raw_place, text_of_html
from methods.phenotyping_identifiers import Edit
from methods.phenotyping_names import Names, Spans, names_of
from methods.phenotyping_notes import Note
from methods.phenotyping_scan import Scan, without_identifiers
from methods.phenotyping_scan import apart as scan_apart
from protocols.errors import BadInput
from protocols.retriever import RetrieverConfig, RetrieverService, Window
from tests.methods.phenotyping_toys import VELTO, Run, note, reader, runner

SECRET = b"0123456789abcdef"


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: reader(toys))


def clean(text: str, days: int = 10, *known: str, kept: Spans = ()) -> str:
    return edited(text, edits_of(text, days, [names_of("\n".join(known))], kept))[0]


def stage(secret: bytes = SECRET, days: int = 365) -> Stage:
    return Stage(days, secret, {}, {})


WHOLE_DATES = [
    ("3/5/2020", "3/15/2020"),
    ("03/25/2020", "04/04/2020"),
    ("3/25/20", "4/4/20"),
    ("12-25-2019", "01-04-2020"),
    ("12.25.2019", "01.04.2020"),
    ("25/12/2019", "04/01/2020"),
    ("25.12.2019", "04.01.2020"),
    ("2020-02-25", "2020-03-06"),
    ("2020/2/25", "2020/3/6"),
    ("2020-03-05T10:30", "2020-03-15T10:30"),
    ("20200305", "20200315"),
    ("20191225103000", "20200104103000"),
    ("March 5, 2020", "March 15, 2020"),
    ("March 25 2020", "April 4 2020"),
    ("MARCH 25TH, 2020", "APRIL 4TH, 2020"),
    ("march 22nd, 2020", "april 1st, 2020"),
    ("Sept. 28, 2020", "Oct. 8, 2020"),
    ("Aug 28 2020", "Sep 7 2020"),
    ("February 6,2007", "February 16,2007"),
    ("Mar-05-92", "Mar-15-92"),
    ("25 March 2020", "4 April 2020"),
    ("05-Mar-2020", "15-Mar-2020"),
    ("05MAR2020", "15MAR2020"),
    ("25-DEC-19", "04-JAN-20"),
    ("30th of October 2008", "9th of November 2008"),
    ("May 28, 2020", "June 7, 2020"),
    ("Monday, March 9, 2020", "Thursday, March 19, 2020"),
    ("Mon 3/9/2020", "Thu 3/19/2020"),
    ("2/29/2020", "3/10/2020"),
    ("02/29/00", "03/10/00"),
    ("12/25/99", "01/04/00"),
    ("3/5/2020,3/6/2020", "3/15/2020,3/16/2020"),
    ("3/5/20-3/9/20", "3/15/20-3/19/20"),
    ("DOB:03/05/1950", "DOB:03/15/1950"),
    ("2. July 17, 2002", "2. July 27, 2002"),
    ("seen.3/5/2020", "seen.3/15/2020"),
    ("2020-Mar-05", "2020-Mar-15"),
    ("3 / 5 / 2020", "3 / 15 / 2020"),
    ("3/5/2020Time", "3/15/2020Time"),
    ("2020-03-05/2020-03-09", "2020-03-15/2020-03-19"),
    ("O2 sat 3/5/2020", "O2 sat 3/15/2020"),
    ("3/5/\n2020", "3/15/\n2020"),
    ("3/5/ 2020", "3/15/ 2020"),
    ("3/5 /2020", "3/15 /2020"),
    ("Mar\n5, 2020", "Mar\n15, 2020"),
    ("March 5,\r\n2020", "March 15,\r\n2020"),
    ("5\nMarch 2020", "15\nMarch 2020"),
    ("3\u20135\u20132020", "3\u201315\u20132020"),
    ("2020\u201103\u201105", "2020\u201103\u201115"),
    ("DOS3/5/2020", "DOS3/15/2020"),
    ("DATE03/05/2020", "DATE03/15/2020"),
    ("DOS3/5/20", "DOS3/15/20"),
    ("_3/5/2020_ and _Mar 5, 2020_", "_3/15/2020_ and _Mar 15, 2020_"),
    ("Date:3/5/20Time:10:00", "Date:3/15/20Time:10:00"),
    ("DOB: 03051985", "DOB: 03151985"),
    ("12/31/9999", "[date]"),
    ("9999-12-31", "[date]"),
    ("2/30/2020", "[date]"),
    ("February 30, 2020", "[date]"),
    ("13/45/2020", "[date]"),
]


@pytest.mark.parametrize(("text", "expected"), WHOLE_DATES, ids=[text for text, _ in WHOLE_DATES])
def test_whole_dates_are_moved_in_their_own_form(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert clean(f"Seen {text}, he left.") == f"Seen {expected}, he left."


def test_a_date_that_would_leave_the_calendar_is_a_placeholder() -> None:
    assert clean("2199-12-30", 365) == "2200-12-30"
    assert clean("1800-01-05", -36500) == "1700-01-29"
    # No year of these is beyond the calendar, but a note's own date may be.
    far = deidentified(Note("p", "n", "", date="9999-12-31"), stage(days=1), Counter())
    near = deidentified(Note("p", "n", "", date="0001-01-01"), stage(days=1), Counter())
    assert sorted([far.date, near.date])[0] == ""
    assert {far.date, near.date} <= {"", "9999-12-30", "0001-01-02"}


BESIDE_WHOLE_DATES = [
    ("Admitted 3/5/2020 to 3/9.", "Admitted 3/15/2020 to [date]."),
    ("3/5/2020 - 3/9", "3/15/2020 - [date]"),
    ("3/5/2020, 3/7, 3/9", "3/15/2020, [date], [date]"),
    ("3/5/20, 3/7 & 3/9", "3/15/20, [date] & [date]"),
    ("Labs: 3/4 Hgb 9, 3/5 Hgb 8 (3/5/2020)", "Labs: [date] Hgb 9, [date] Hgb 8 (3/15/2020)"),
    ("3/5-7/2020", "[date]"),
    ("3-5-2020 to 3-9", "3-15-2020 to [date]"),
    ("3.9, 3.10.2020, INR 2.1", "[date], 3.20.2020, INR 2.1"),
    ("January 3rd through the 5th, 2020", "[date]"),
    ("March 3, 5, and 7, 2020", "[date]"),
    ("March 5, 2020 until the 9th; home on the 10th.", "March 15, 2020 until the [date]; home on the [date]."),
    ("March 5, 2020, 2nd visit, the 5th toe", "March 15, 2020, 2nd visit, the 5th toe"),
    ("3/5/2020, 10 mg, 1/2 tablet, 1/2 NS", "3/15/2020, 10 mg, 1/2 tablet, 1/2 NS"),
    (
        "3/5/2020: strength is 4/5 in left and 5/5 in right, pulses 2/4, reflexes were 2/4, pain 3/10, 2/6 murmur",
        "3/15/2020: strength is 4/5 in left and 5/5 in right, pulses 2/4, reflexes were 2/4, pain 3/10, 2/6 murmur",
    ),
    ("K 5.0, 3/5/2020, 3.9", "K 5.0, 3/15/2020, 3.9"),
    (
        "3/5/2020: Pupils 4/4 decreasing to 2/2, reflexes 3/3+ biceps, 2/3+ ankles, 2/6 SEM",
        "3/15/2020: Pupils 4/4 decreasing to 2/2, reflexes 3/3+ biceps, 2/3+ ankles, 2/6 SEM",
    ),
    (
        "3/5/2020: hypoxia 2/2 COPD, upper 1/3 of it, distal 2/3; 10/10 pain; seen 2/2.",
        "3/15/2020: hypoxia 2/2 COPD, upper 1/3 of it, distal 2/3; 10/10 pain; seen [date].",
    ),
    ("3/5/2020: L4/5, C5/6, 20/20, BP 120/80", "3/15/2020: L4/5, C5/6, 20/20, BP 120/80"),
]


@pytest.mark.parametrize(("text", "expected"), BESIDE_WHOLE_DATES, ids=[text for text, _ in BESIDE_WHOLE_DATES])
def test_days_beside_whole_dates_do_not_tell_the_shift(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in March 2020", "in [date]"),
        ("in May of 2003", "in [date]"),
        ("in Mar 2020 and Sept. 2019", "in [date] and [date]"),
        ("on March 5 and 5 March", "on [date]"),
        ("on the 31st of October, by", "on the [date], by"),
        ("March 5-9, 2020", "[date]"),
        ("since December and in late August", "since [date] and in late [date]"),
        ("seen in march and since May", "seen in [date] and since [date]"),
        ("03/2020 and 12/2007", "[date] and [date]"),
        ("2020-03 and 03-2020", "[date] and [date]"),
        ("seen sept 5 and jan 12th", "seen [date] and [date]"),
        ("Mar '20", "[date]"),
        ("seen on 3/5, extubated since 2/6.", "seen on [date], extubated since [date]."),
        ("Films on 1/04, seen 03/15", "Films on [date], seen [date]"),
        ("In 9/94 she; (8/94); since 10/40", "In [date] she; ([date]); since [date]"),
        ("from 1/29 to 2/6/06", "from [date] to 2/16/06"),
        ("born in 1950, MI in 2003", "born in 1950, MI in 2003"),
    ],
)
def test_dates_without_a_part_are_placeholders_and_years_stay(text: str, expected: str) -> None:
    assert clean(text) == expected


FOUND = [
    ("call (555) 555-1234 today", "call [phone] today"),
    ("555-123-4567 x12, 555.123.4567; 555/123-4567", "[phone], [phone]; [phone]"),
    ("1-555-123-4567 or +1 555 123 4567", "[phone] or [phone]"),
    ("+44 20 7946 0958", "[phone]"),
    ("555 867 5309", "[phone]"),
    ("fax: 5551234567, phone 555-1200, call 123-4567", "fax: [phone], phone [phone], call [phone]"),
    ("at 555-1234.", "at [phone]."),
    ("pager 4567, beeper #12345", "pager [phone], beeper #[phone]"),
    ("write to a.b-c+d@mail.example.org.", "write to [email]."),
    ("see https://example.org/a?b=1, www.example.net/x.", "see [url], [url]."),
    ("on example.com daily", "on [url] daily"),
    ("from 192.168.0.1 and fe80:0:0:0:0:0:0:1", "from [ip] and [ip]"),
    ("device 00:1b:44:11:3a:b7", "device [id]"),
    ("SSN 123-45-6789, social security number: 123456789", "SSN [ssn], social security number: [ssn]"),
    ("123-45-6789; xxx-xx-6789", "[ssn]; [ssn]"),
    ("MRN: 1234567, MRN#A-12345, mrn 12 34 56", "MRN: [id], MRN#[id], mrn [id]"),
    ("Acct # 99-123, account number 12345", "Acct # [id], account number [id]"),
    ("Medical record no. 1234567", "Medical record no. [id]"),
    ("Account: 123456", "Account: [id]"),
    ("health plan ID: XYZ123456", "health plan ID: [id]"),
    ("license # A1234567; driver's license number D123-456", "license # [id]; driver's license number [id]"),
    ("licence plate ABC 1234", "licence plate [id]"),
    ("VIN 1HGBH41JXMN109186, DEA AB1234567, NPI 1234567893", "VIN [id], DEA [id], NPI [id]"),
    ("serial number 12345, device id AB-1234", "serial number [id], device id [id]"),
    ("accession no 2020123456", "accession no [id]"),
    ("number 1234567891234", "number [id]"),
    ("lives at 12 Main Street, Apt 4B, today", "lives at [address], today"),
    ("123 N. 5th St., 45 Elm Dr, 9 Old Mill Rd.", "[address]., [address], [address]."),
    ("123 MAIN STREET; 123 main street; P.O. Box 77", "[address]; [address]; [address]"),
    ("123 MAIN ST; 12 OAK HILL ST APT 4B", "[address]; [address]"),
    ("Springfield, IL 62701-1234", "[address], IL [zip]"),
    ("12 Main St, New Haven, Connecticut 06510", "[address], [address], Connecticut [zip]"),
    ("ZIP code 02115", "ZIP code [zip]"),
    ("aged 93, age 90, age: 101, AGE/SEX: 93/F", "aged 90+, age 90+, age: 90+, AGE/SEX: 90+/F"),
    ("a 93-year-old, 93 year old, 93 years of age", "a 90+-year-old, 90+ year old, 90+ years of age"),
    ("93 y/o, 93yo, 93 y.o. man, 93 yrs old", "90+ y/o, 90+yo, 90+ y.o. man, 90+ yrs old"),
    ("94F with CHF, A 94 M presents, 94 M, age 94F", "90+F with CHF, A 90+ M presents, 90+ M, age 90+F"),
    ("94F, here; 94 female, 94 years, 94 yrs", "90+F, here; 90+ female, 90+ years, 90+ yrs"),
    ("ninety-three-year-old; his 95th birthday", "90+-year-old; his 90+ birthday"),
    ("Dr. Khan, Dr Khan, Mr. O'Brien's, Mrs. Smith-Jones", "Dr. [name], Dr [name], Mr. [name]'s, Mrs. [name]"),
    ("Ms. Jane Q. Roe saw", "Ms. [name] saw"),
    ("Patient name:SMITH,JOHN A", "Patient name:[name]"),
    ("Name: John Smith\nPatient: Smith, John\nPt: Smith", "Name: [name]\nPatient: [name]\nPt: [name]"),
    ("John Smith, MD; Jane Q. Roe, M.D.; Amy Poe, DO", "[name], MD; [name], M.D.; [name], DO"),
    (
        "A. Poe, RN; Joe Doe, NP; JOHN SMITH, PA-C; Seen By Al Roe MD",
        "[name], RN; [name], NP; [name], PA-C; Seen By [name] MD",
    ),
    (
        "cc: Ed Núñez, MD. Signed by Ed Roe on, dictated by: Ed Roe",
        "cc: [name], MD. Signed by [name] on, dictated by: [name]",
    ),
    ("Attending: Ed Roe", "Attending: [name]"),
    ("Patient Name: John Smith Diagnosis: COPD", "Patient Name: [name] Diagnosis: COPD"),
    ("Dr. Ed Roe Cardiology Clinic", "Dr. [name] Cardiology Clinic"),
    ("Dr. St. John, 91Y M", "Dr. [name], 90+Y M"),
    ("Dr. Ludwig van der Berg saw", "Dr. [name] saw"),
    ("Dr. X. He saw Dr. A without Dr. J. Smith", "Dr. [name]. He saw Dr. [name] without Dr. [name]"),
    ("Drs. Smith and Jones, Dr. and Mrs. Roe", "Drs. [name] and [name], Dr. and Mrs. [name]"),
    ("SEEN BY DR. JONES FOR COPD. MS. ROE CAME", "SEEN BY DR. [name] FOR COPD. MS. [name] CAME"),
    ("seen by dr. jones for copd", "seen by dr. [name] for copd"),
    ("Dr. Müller, Dr. Jose\u0301 Nu\u0301n\u0303ez", "Dr. [name], Dr. [name]"),
    ("Patient Name: ROE, JANE Q DOB: 3/5/1950", "Patient Name: [name] DOB: 3/15/1950"),
]


@pytest.mark.parametrize(("text", "expected"), FOUND, ids=[text for text, _ in FOUND])
def test_identifiers_become_placeholders(text: str, expected: str) -> None:
    assert clean(text) == expected
    # What is written says nothing that would be replaced once more.
    assert clean(expected, 0) == expected


@pytest.mark.parametrize(
    "text",
    [
        "T 98.6, BP 120/80, HR 93, RR 18, SpO2 98% on 2 L, wt 93 kg, temp 93 F, 93%",
        "3/5 strength, strength was 5/5, reflexes 2/4, grade 2/6 murmur, pain 8/10, MMSE 27/30, Berg 46/56 points",
        "1/2 tablet, on 1/2 tablet daily, 2-1/2 packs, in 1/2 NS, on 2/6 systolic murmur, 1/5 nodes, 38-2/7 weeks",
        "C5-6, L4-5, T12-L1, S1-S2, V1-V6, T4/05, G3 P2-0-1-2, 5/0 nylon, 3-0 silk",
        "I27.0, I82.4, 416.0, 416.8, ICD-9 453.4, ICD-10 Z01.7",
        "WBC 12.5, Na 140, K 4.1, platelets 250000, 1500000 copies, viral load 10000000, INR 2.0-3.0, H&H 10/32",
        "7.38/67/86/97, PH 7.35, vent 12/500/40, 140/4.1/102/24, 20/40, 6/60, 59/9",
        "500-1000 mg, 150-4000 units, 5-10 mg q4-6h, 2-3 times, 10/20/30 mg, 10-15-20 units, 1:1000, 1/7",
        "5-FU, CA-125, CA 19-9, CD4 350, H1N1, +2 pulses, 3+ edema, 10:30, 1999 to 2003, the 1990s",
        "age 93 months, aged 89, an 88-year-old, 9-year-old, for 93 days, age 0.93",
        "THIS MAY BE VEINS, it may repeat, a march fracture, MAR reviewed, OCT scan, marched, O2 sat 98",
        "MS. Patient denies; SEVERE MR. EF 55; no MR; MS and DR; MILD TR, MR. EF 55; the mr. was mild",
        "OCT 10 mm cyst, DEC 10 mg, MAY 5 mg, May 2 tablets, pain rated on 3/10, ratio 10-12-14",
        "T 101F with rigors, fever of 102 F with chills, 101F fever, 94 F, 100 M cells, 90Y microspheres, 90-Y resin",
        "Heparin 5000 Units Sq Tid, Lantus 10 Units Sq, 18 Fr Foley In Place, 12 LEAD ST, 2 MM LATERAL ST",
        "Cr 200-1250 range, WBC 234-5678, patient no 325mg aspirin, patient no 325 mg, specimen no 123 growth",
        "AS. MR. TR. and no AS. MS. LVH present; Patient: Stable; Patient: Feels better; Pain, RN notified",
        "COPD, MD aware",
        "CHEST PAIN, DO NOT; CHEST X-RAY, PA AND LATERAL; Discussed With MD; Chest, PA and lateral",
        "room 412, visit #2, case 12, unit 5, serial troponins, account of it, record 5 days, lot 12, model 12345",
        "ST depression of 2 mm, in 5 Lead St depression, 5 Chest Ct scans, IN 12345 units, Heparin, OR 10000 units",
        "cell count 450, white cell 12.5, ext 0-130 degrees, extension 120, called 3 times, PT 12.5, home O2",
        "atrial fibrillation, Crohn's disease, Dr. and nurse, Dr. who, Foley catheter, no.",
    ],
)
def test_medicine_stays(text: str) -> None:
    assert clean(text) == text


def test_names_of_the_table() -> None:
    known = ("José García-López", "Anna K. White", "Li Wu", "O'Brien, Pat", "Parkinson, Ruth")
    for text, expected in [
        ("Jose came", "[name] came"),
        ("JOSE\u0301 GARCÍA", "[name]"),
        ("garcia-lopez, josé", "[name]"),
        ("Garcia's wife", "[name]'s wife"),
        ("Anna White has a white count, white. White again", "[name] has a white count, white. White again"),
        ("seen with White today", "seen with [name] today"),
        ("White, Anna", "[name]"),
        ("Anna B. White", "[name]"),
        ("Li level 0.8, Li Wu, wu li", "Li level 0.8, [name], [name]"),
        ("Mr O'Brien; OBrien; Brien", "Mr [name]; OBrien; [name]"),
        (
            "Parkinson's disease, Parkinson disease, Parkinson saw her",
            "Parkinson's disease, Parkinson disease, [name] saw her",
        ),
        ("Annas, Joanna, Garcialopez", "Annas, Joanna, Garcialopez"),
        ("Anna\r\nWhite", "[name]"),
    ]:
        assert clean(text, 10, *known) == expected, text
    assert clean("Anna White, García") == "Anna White, García"


EPONYMS = (
    "Anna Branch",
    "Frank Walker",
    "Lou Fields",
    "Drew Miles",
    "Foster Tanner",
    "Glasgow Wegener",
    "Kim Hodgkin",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("left bundle Branch block", "left bundle Branch block"),
        ("Branch vein, seen with Branch today; Anna Branch", "Branch vein, seen with [name] today; [name]"),
        ("Frank blood, uses a walker, visual fields full", "Frank blood, uses a walker, visual fields full"),
        ("walks 2 miles; drew blood; in foster care", "walks 2 miles; drew blood; in foster care"),
        ("at Tanner stage 3, on Glasgow Coma Scale", "at Tanner stage 3, on Glasgow Coma Scale"),
        ("with Wegener's granulomatosis, Wegener, Glasgow", "with Wegener's granulomatosis, [name]"),
        (
            "with Hodgkin lymphoma, non-Hodgkin, and Hodgkin said",
            "with Hodgkin lymphoma, non-Hodgkin, and [name] said",
        ),
    ],
)
def test_names_that_are_words_or_eponyms(text: str, expected: str) -> None:
    assert clean(text, 10, *EPONYMS) == expected


SHIPPED = [one.pattern_set() for one in read_definitions([str(Path(phenotyping.__file__).parent / "definitions")])]


def shipped(text: str) -> Spans:
    found = Searcher(SHIPPED).found(text).values()
    return scan_apart((match.start, match.end) for matches in found for match in matches)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Seen by Dr. Smith Atrial Fibrillation stable", "Seen by Dr. [name] Atrial Fibrillation stable"),
        ("Patient Name: Jo Smith Pulmonary Hypertension", "Patient Name: [name] Pulmonary Hypertension"),
        ("Emphysema, MD; Dr. COPD, Emphysema Smith", "Emphysema, MD; Dr. COPD, Emphysema [name]"),
        ("É Ångström: emphysema, Emphysema", "É Ångström: emphysema, Emphysema"),
    ],
)
def test_what_a_phenotype_is_found_by_is_no_name(text: str, expected: str) -> None:
    assert clean(text, 10, "Emphysema Smith", kept=shipped(text)) == expected


async def test_a_part_is_read_without_names_and_with_its_diseases(tmp_path: Path, toys: Any) -> None:
    retriever = await toys.serve(RetrieverService, RetrieverActor(RetrieverConfig(kind="pattern")))
    scan = Scan(sets=SHIPPED, window=Window(), folder=str(tmp_path))
    names = {"p": "Copd Quillon"}
    notes = [Note("p", "1", "É. Dr. COPD and Copd Quillon."), Note("q", "2", "Copd Quillon, a. COPD")]
    replaced: Counter[str] = Counter()
    after = await without_identifiers(retriever, scan, Stage(365, SECRET, names, {}), notes, replaced)
    assert [one.text for one in after] == ["É. Dr. COPD and Copd [name].", "Copd Quillon, a. COPD"]
    assert replaced == {"name": 1}


def test_names_are_kept_as_lines_and_their_parts_made_when_they_are_needed(tmp_path: Path) -> None:
    words = named(tmp_path, 'patient_id,name\np,"Quillon\nVesper"\np,Brandt\n,Roe\n')
    one = stage_of(DeidentifyConfig(**words))
    assert one.names == {"p": "Quillon Vesper\nBrandt", "": "Roe"}
    assert one.known("p") == [names_of("Roe"), names_of("Quillon Vesper\nBrandt")]
    assert one.known("q") == [names_of("Roe")]


def test_a_patient_s_names_are_replaced_in_their_notes_and_those_of_staff_in_all(tmp_path: Path) -> None:
    table = tmp_path / "names.csv"
    table.write_text("patient_id,name\np,Quillon Vesper\n,Ottoline Brandt\n")
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    from_file = stage_of(DeidentifyConfig(secret=str(tmp_path / "secret"), names=str(table)))
    text = "Vesper and Brandt"
    told = {name: deidentified(Note(name, "n", text), from_file, Counter()).text for name in ("p", "q")}
    assert told == {"p": "[name] and [name]", "q": "Vesper and [name]"}
    lines = tmp_path / "names.jsonl"
    lines.write_text('{"patient_id": 7, "name": "Quillon Vesper"}\n{"patient_id": null, "name": "Brandt"}\n')
    from_lines = stage_of(DeidentifyConfig(secret=str(tmp_path / "secret"), names=str(lines)))
    assert deidentified(Note("7", "n", text), from_lines, Counter()).text == "[name] and [name]"
    assert from_lines.digests["secret"] == from_file.digests["secret"]
    assert from_lines.digests["names"] != from_file.digests["names"]


@given(st.text(max_size=20), st.binary(min_size=16, max_size=40), st.integers(1, 400))
def test_the_shift_is_constant_bounded_and_never_none(patient: str, secret: bytes, most: int) -> None:
    days = stage(secret, most).days_of(patient)
    assert 1 <= abs(days) <= most
    assert stage(secret, most).days_of(patient) == days


def test_the_shift_takes_every_value_and_differs_between_patients_and_secrets() -> None:
    assert {stage(days=2).days_of(f"p{i}") for i in range(100)} == {-2, -1, 1, 2}
    many = [stage().days_of(f"p{i}") for i in range(2000)]
    assert len(set(many)) > 600 and min(many) < -350 and max(many) > 350
    others = [stage(b"fedcba9876543210").days_of(f"p{i}") for i in range(2000)]
    assert sum(a == b for a, b in zip(many, others, strict=True)) < 20
    # HMAC-SHA256 of "days", a zero and the id, from -365 to 365 without 0.
    assert stage().days_of("p") == 72


@given(
    st.dates(date(1950, 1, 1), date(2060, 1, 1)),
    st.integers(0, 1000),
    st.integers(-365, 365).filter(bool),
    st.sampled_from(["%m/%d/%Y", "%Y-%m-%d", "%B %d, %Y", "%d-%b-%Y", "%A, %B %d, %Y"]),
)
def test_intervals_stay(first: date, apart_by: int, days: int, form: str) -> None:
    second = first + timedelta(days=apart_by)
    text = f"{first.strftime(form)} | {second.strftime(form)}"
    told = clean(text, days).split(" | ")
    found = [datetime.strptime(one, form).date() for one in told]
    assert found == [first + timedelta(days=days), second + timedelta(days=days)]
    # The weekday is that of the new day, or it would tell the shift by seven.
    assert form[:2] != "%A" or told[0].startswith(found[0].strftime("%A"))


def test_a_note_s_own_date_moves_with_those_in_its_text() -> None:
    one = stage()
    days = one.days_of("p")
    replaced: Counter[str] = Counter()
    for day in ("2020-03-05", "2020-03-05T10:30:00+02:00"):
        told = deidentified(Note("p", "n", "Seen 2020-03-05, Dr. Roe", date=day, note_type="x"), one, replaced)
        moved = (date(2020, 3, 5) + timedelta(days=days)).isoformat()
        assert (told.date, told.text) == (moved + day[10:], f"Seen {moved}, Dr. [name]")
        assert (told.patient_id, told.note_id, told.note_type) == ("p", "n", "x")
    assert deidentified(Note("p", "n", "x"), one, replaced).date == ""
    assert replaced == {"date": 2, "name": 2}


def test_pieces_that_overlap_are_replaced_to_their_last_character() -> None:
    found = [Edit(5, 9, "b", "B"), Edit(0, 6, "a", "A"), Edit(0, 4, "c", "C"), Edit(9, 10, "d", "D")]
    assert apart(found) == [Edit(0, 6, "a", "A"), Edit(6, 9, "b", "[b]"), Edit(9, 10, "d", "D")]
    assert apart([Edit(0, 2, "a", "A"), Edit(0, 2, "b", "B")]) == [Edit(0, 2, "a", "A")]


PLANTED = [
    "3/5/2020",
    "March 2020",
    "(555) 555-1234",
    "a@b.org",
    "Dr. Vesper",
    "93-year-old",
    "MRN: 1234567",
    "Quillon",
]
TEXTS = st.lists(
    st.one_of(st.sampled_from([*PLANTED, "\r\n", "\n", " ", ". ", "\x00", "e\u0301", "𝔘"]), st.text(max_size=8)),
    max_size=25,
).map("".join)


def vesper() -> Names:
    names = Names()
    names.add("Quillon Vesper")
    return names


@given(TEXTS, st.integers(0, 1 << 30), st.integers(0, 60))
def test_every_quote_is_where_it_says_in_both_texts(text: str, at: int, length: int) -> None:
    edits = edits_of(text, 10, [vesper()])
    told, places = edited(text, edits)
    assert all(one.end <= other.start for one, other in pairwise(edits))
    kept = {i for start, end in spans_left(edits, len(text)) for i in range(start, end)}
    seen = set()
    for i, letter in enumerate(told):
        raw, end = raw_place(places, i), raw_place(places, i + 1, last=True)
        if raw in kept:
            # A character outside of what was replaced is itself.
            assert (text[raw], end) == (letter, raw + 1)
            seen.add(raw)
        else:
            assert any((raw, end) == (one.start, one.end) for one in edits)
    assert seen == kept
    start = at % (len(told) + 1)
    end = min(len(told), start + length)
    if start < end:
        raw = raw_place(places, start), raw_place(places, end, last=True)
        assert 0 <= raw[0] < raw[1] <= len(text)
        if not any(one.start < raw[1] and raw[0] < one.end for one in edits):
            assert text[raw[0] : raw[1]] == told[start:end]


def spans_left(edits: list[Edit], length: int) -> list[tuple[int, int]]:
    ends = [0, *(one.end for one in edits)]
    starts = [*(one.start for one in edits), length]
    return list(zip(ends, starts, strict=True))


HTML = st.lists(
    st.one_of(
        st.sampled_from(
            ["<p>", "</p>", "<br/>", "<b>", "&amp;", "&lt;", "&#233;", "&nbsp;", "<!-- 3/5/2020 -->", "\r\n"]
        ),
        st.sampled_from([*PLANTED, "3/<b>5</b>/2020", "Dr.&nbsp;Vesper", "a text", "é𝔘", " ", "\n"]),
        st.text("ab <&", max_size=4),
    ),
    max_size=25,
).map("".join)


@given(HTML)
def test_places_lead_through_html_to_the_raw_document(html: str) -> None:
    text, inner = text_of_html(html)
    edits = edits_of(text, 10, [vesper()])
    told, outer = edited(text, edits)
    places = composed(outer, tuple(inner))
    assert list(places) == sorted(places)
    for i in range(len(told)):
        middle = raw_place(outer, i), raw_place(outer, i + 1, last=True)
        wanted = raw_place(inner, middle[0]), raw_place(inner, middle[1], last=True)
        assert (raw_place(places, i), raw_place(places, i + 1, last=True)) == wanted
        assert 0 <= wanted[0] < wanted[1] <= len(html)


def test_places_through_html_one_by_one() -> None:
    html = "<p>Dr.&nbsp;V&eacute;sper on <b>3/5</b>/2020 &amp; well</p>"
    text, places = text_of_html(html)
    before = Note("p", "n", text, raw_places=tuple(places))
    after = deidentified(before, stage(days=1), Counter())
    day = "3/6" if stage(days=1).days_of("p") == 1 else "3/4"
    assert after.text == f"\nDr.\xa0[name] on {day}/2020 & well\n"
    for piece, raw in [
        ("Dr.", "Dr."),
        ("[name]", "V&eacute;sper"),
        (f"{day}/2020", "3/5</b>/2020"),
        (" & well", " &amp; well"),
        ("\nDr.\xa0", "<p>Dr.&nbsp;"),
    ]:
        start = after.text.index(piece)
        found = raw_place(after.raw_places, start), raw_place(after.raw_places, start + len(piece), last=True)
        assert html[slice(*found)] == raw
    quiet = Note("p", "n", "plain")
    assert deidentified(quiet, stage(), Counter()).raw_places == ()
    untouched = Note("p", "n", "a & b", raw_places=((0, 0, 0), (2, 2, 7), (3, 7, 0)))
    assert deidentified(untouched, stage(), Counter()).raw_places == untouched.raw_places


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "1",
            "1/",
            "1-",
            "1.",
            "a",
            "a.",
            "a@",
            "www.",
            "Dr. ",
            "Mr. A. ",
            "March ",
            "1 Aa ",
            "MRN ",
            "+1 ",
            "(",
            "5 May ",
        ),
        *(
            "1:",
            "a::",
            "Aa, MA ",
            "phone ",
            "http://)",
            "é",
            "e\u0301",
            "Miss-",
            "drs. a and ",
            "93 y",
            "3/5/2020, ",
            "1/1/2020 strength 3/5 ",
            "Patient: Aa, ",
            "Aa Bb, MD ",
            "12 AAA BBB ",
            "on 1/",
            "1 a ",
        ),
    ],
)
def test_it_takes_linear_time(piece: str) -> None:
    def calls(characters: int) -> int:
        """How many functions are called, those of C included. What patterns read is linear by RE2, or bounded."""
        text, seen = piece * (characters // len(piece)), 0

        def count(*_: Any) -> None:
            nonlocal seen
            seen += 1

        sys.setprofile(count)
        try:
            clean(text, 10, "Miss Aa")
        finally:
            sys.setprofile(None)
        return seen

    clean(piece, 10, "Miss Aa")
    # Four times the text takes four times as many calls, or sixteen if it were its square.
    assert calls(12_000) < 5 * calls(3_000) + 1_000


def bad_secret(path: Path, told: bytes | None) -> str:
    if told is not None:
        path.write_bytes(told)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: {"secret": str(t / "no")}, r"deidentify.secret: cannot read .*no: No such file or directory"),
        (lambda t: {"secret": bad_secret(t / "s", b"\n")}, r"deidentify.secret: .*s is empty; expected at least 16"),
        (
            lambda t: {"secret": bad_secret(t / "s", b"x" * 15 + b"\n")},
            r"deidentify.secret: .*s has 15 bytes; expected",
        ),
        (lambda t: named(t, "patient_id,who\np,Vesper\n"), r"deidentify.names: .*n.csv:2: no column name; expected"),
        (lambda t: named(t, "name\nVesper\n"), r"deidentify.names: .*n.csv:2: no column patient_id; expected"),
        (lambda t: named(t, "patient_id,name\n"), r"deidentify.names: .*n.csv holds no names; expected rows"),
        (lambda t: named(t, "patient_id,name\np, 7\n"), r"deidentify.names: .*n.csv:2: name: expected letters"),
    ],
)
def test_bad_files_are_told_in_one_message(
    make: Callable[[Path], dict[str, str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message) as told:
        stage_of(DeidentifyConfig(**make(tmp_path)))
    assert "Vesper" not in str(told.value) and "xxx" not in str(told.value)


def named(folder: Path, table: str) -> dict[str, str]:
    (folder / "n.csv").write_text(table)
    return {"secret": bad_secret(folder / "s", SECRET), "names": str(folder / "n.csv")}


def test_a_bad_secret_ends_before_there_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.yaml").write_text(VELTO)
    (tmp_path / "n.jsonl").write_text("")
    words = [
        f"notes=[{tmp_path / 'n.jsonl'}]",
        f"definitions=[{tmp_path / 'd.yaml'}]",
        f"runs_dir={tmp_path / 'runs'}",
        "wandb=disabled",
    ]
    assert main(["phenotyping", *words, f"deidentify.secret={tmp_path / 'no'}"]) == 2
    assert "deidentify.secret: cannot read" in capsys.readouterr().err
    assert main(["phenotyping", *words, "deidentify.names=x.csv"]) == 2
    assert "secret: missing; expected a file of random bytes" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_secret_is_not_shown_and_one_that_changes_under_way_is_told(tmp_path: Path) -> None:
    config = DeidentifyConfig(secret=bad_secret(tmp_path / "s", SECRET))
    begun = stage_of(config)
    assert SECRET.decode() not in repr(begun) + str(begun.digests) and SECRET.hex() not in str(begun.digests)
    assert kept_stage(config, begun.digests) is kept_stage(config, begun.digests)
    bad_secret(tmp_path / "s", SECRET[::-1])
    assert kept_stage(config, begun.digests).secret == SECRET
    other = stage_of(config)
    assert kept_stage(config, other.digests).secret == SECRET[::-1]
    with pytest.raises(BadInput, match=r"deidentify.secret: .*s has changed since the run began"):
        kept_stage(config, begun.digests)


CANARIES = (
    "Quillon",
    "Vesper",
    "555-867-5309",
    "Thistlewood",
    "2020-01-05",
    "01/05/2020",
    "7788991",
    "zq@example.org",
)


def ward() -> list[dict[str, object]]:
    return [
        note(
            "p", 4, "Quillon Vesper (MRN 7788991) has veltosis since 01/05/2020, call 555-867-5309 or zq@example.org."
        ),
        note("p", 8, "Dr. Thistlewood saw Vesper on 01/09/2020: denies\r\nveltosis at this visit in the clinic."),
        note("q", 4, "He has veltosis since 01/05/2020, which is stable on treatment at home."),
        note("q", 3, "Nothing of note; call 555-867-5309."),
        {
            "patient_id": "q",
            "note_id": "q-bad",
            "text": "Has veltosis, he says it himself.",
            "date": "Jan 5th by Vesper",
        },
    ]


def settings(folder: Path, secret: bytes = SECRET) -> list[str]:
    (folder / "secret").write_bytes(secret)
    (folder / "names.csv").write_text("patient_id,name\np,Quillon Vesper\n")
    return [f"deidentify.secret={folder / 'secret'}", f"deidentify.names={folder / 'names.csv'}"]


def holders(folder: Path) -> dict[str, list[str]]:
    """Files that hold a canary, or the secret."""
    files = {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
    assert {"decisions.jsonl", "review.html", "rejects.jsonl", "audit.json", "answers.sqlite"} <= files.keys()
    words = (*CANARIES, SECRET.decode(), SECRET.hex())
    return {name: found for name, told in files.items() if (found := [w for w in words if w.encode() in told])}


@pytest.mark.parametrize("words", [(), ("answer=sample", "reduce.by=llm")], ids=["score", "sample"])
async def test_no_identifier_is_in_any_file_of_a_run_or_in_its_logs(
    run: Run,
    words: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.DEBUG):
        done = await run("canary", ward(), *settings(tmp_path), *words)
    printed = capsys.readouterr()
    logged = caplog.text + printed.out + printed.err
    assert not [one for one in (*CANARIES, SECRET.decode()) if one in logged]
    assert holders(done.folder) == {}
    assert not [one for one in CANARIES for prompt in done.policy.texts if one in prompt]
    # The same run without the stage holds them all.
    plain = await run("plain", ward(), *words)
    assert {word for found in holders(plain.folder).values() for word in found} >= {"Quillon", "2020-01-05"}


async def test_citations_resolve_in_both_texts_and_days_stay(run: Run, tmp_path: Path) -> None:
    plain = await run("plain", ward(), "window.characters=40", "window.snap=0")
    done = await run("clean", ward(), "window.characters=40", "window.snap=0", *settings(tmp_path))
    raw = {str(one["note_id"]): str(one["text"]) for one in ward()}
    one = stage_of(DeidentifyConfig(secret=str(tmp_path / "secret"), names=str(tmp_path / "names.csv")))
    told = {
        str(row["note_id"]): deidentified(Note(str(row["patient_id"]), "n", str(row["text"])), one, Counter()).text
        for row in ward()
    }
    cited = [(key[0], each) for key, decision in done.decisions.items() for each in decision["evidence"]]
    assert len(cited) == 4
    for patient, each in cited:
        name = each["note_id"]
        assert told[name][each["start"] : each["end"]] == each["quote"]
        start, end = each["raw"] or (each["start"], each["end"])
        assert "veltosis" in raw[name][start:end]
        if "[" not in each["quote"] and not re.search(r"\d", each["quote"]):
            assert raw[name][start:end] == each["quote"]
        before = next(row for row in ward() if row["note_id"] == name).get("date", "")
        if name != "q-bad":
            shift = date.fromisoformat(each["date"]) - date.fromisoformat(str(before))
            assert shift.days == one.days_of(patient)
    assert any(each["raw"] for _, each in cited)
    # Decisions are the same, and so are the days that prompts tell.
    assert {key: each["decision"] for key, each in done.decisions.items()} == {
        key: each["decision"] for key, each in plain.decisions.items()
    }
    days = [sorted(re.findall(r"Written: (\d+) days before", "\n".join(each.policy.texts))) for each in (plain, done)]
    assert days[0] == days[1] and days[0]
    with open(done.folder / "cohort.csv", newline="") as stream:
        rows = {row["subject_id"]: row["cohort_start_date"] for row in csv.DictReader(stream)}
    assert rows["q"] == (date(2020, 1, 5) + timedelta(days=one.days_of("q"))).isoformat()
    (reject,) = map(json.loads, (done.folder / "rejects.jsonl").read_text().splitlines())
    assert reject["reason"] == "date: expected YYYY-MM-DD; the note is read without it"


async def test_what_was_replaced_is_counted_and_the_audit_names_the_secret_by_a_digest(
    run: Run, tmp_path: Path
) -> None:
    done = await run("counted", ward(), *settings(tmp_path))
    first = done.rows[0]
    counts = {name.removeprefix("scan/replaced/"): first[name] for name in first if "replaced" in name}
    assert counts == {"date": 3, "email": 1, "id": 1, "name": 3, "phone": 2}
    summary = (done.folder / "summary.json").read_text()
    assert "Identifiers replaced: date 3, email 1, id 1, name 3, phone 2" in summary
    one = stage_of(DeidentifyConfig(secret=str(tmp_path / "secret"), names=str(tmp_path / "names.csv")))
    audit = json.loads((done.folder / "audit.json").read_text())
    assert audit["deidentified"] == dict(one.digests) and len(one.digests) == 2
    plain = await run("plain", ward())
    assert json.loads((plain.folder / "audit.json").read_text())["deidentified"] == {}
    assert not [name for name in plain.rows[0] if "replaced" in name]


@pytest.mark.parametrize("what", ["secret", "names"])
async def test_a_run_goes_on_with_the_same_secret_and_names_only(
    run: Run, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = settings(tmp_path)
    whole = await run("whole", ward(), *words)
    kept = phenotyping.scan_part
    read: list[int] = []

    async def dies(retriever: Any, scan: Any, part: Any) -> Any:
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(part.index)
        return await kept(retriever, scan, part)

    with monkeypatch.context() as patch:
        patch.setattr(phenotyping, "scan_part", dies)
        with pytest.raises(KeyboardInterrupt):
            await run("part", tmp_path / "whole-notes.jsonl", *words)
    file = tmp_path / ("secret" if what == "secret" else "names.csv")
    before = file.read_bytes()
    file.write_bytes(before + b"q,Somebody Else\n")
    with pytest.raises(BadInput, match=f"deidentify: {what} has changed since the run began; choose another run="):
        await run("part", tmp_path / "whole-notes.jsonl", *words)
    with pytest.raises(BadInput, match="was made with deidentify"):
        await run("part", tmp_path / "whole-notes.jsonl")
    with pytest.raises(BadInput, match=r"was made with deidentify.days=365"):
        await run("part", tmp_path / "whole-notes.jsonl", *words, "deidentify.days=30")
    file.write_bytes(before)
    # The same bytes may be elsewhere.
    (tmp_path / "elsewhere").mkdir()
    done = await run("part", tmp_path / "whole-notes.jsonl", *settings(tmp_path / "elsewhere"))
    same = [(folder / "decisions.jsonl").read_text() for folder in (whole.folder, done.folder)]
    assert same[0].replace('"run":"whole"', '"run":"part"') == same[1]
    other = await run("other", tmp_path / "whole-notes.jsonl", *settings(tmp_path, SECRET[::-1]))
    assert (
        other.decisions["q", "velto"]["evidence"][-1]["date"] != whole.decisions["q", "velto"]["evidence"][-1]["date"]
    )
