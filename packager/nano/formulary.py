"""The closed world of the nano model's clinical language: drugs, conditions, laboratory tests, patients.

Simplified on purpose, so that every answer is known by construction. It is a test language, not medicine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DrugClass:
    """A class of drugs, the one condition in which all of them are avoided, and its members (en, zh)."""

    en: str
    zh: str
    avoid_en: str
    avoid_zh: str
    drugs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LabTest:
    """A laboratory test; values from `urgent` up are urgent, from `emergency` up an emergency.

    All numbers are in tenths of the unit, so that arithmetic on them is exact.
    """

    en: str
    zh: str
    unit: str
    low: int
    urgent: int
    emergency: int
    high: int


CLASSES: tuple[DrugClass, ...] = (
    DrugClass(
        "penicillin",
        "青霉素类",
        "mononucleosis",
        "单核细胞增多症",
        (
            ("amoxicillin", "阿莫西林"),
            ("ampicillin", "氨苄西林"),
            ("oxacillin", "苯唑西林"),
            ("piperacillin", "哌拉西林"),
        ),
    ),
    DrugClass(
        "cephalosporin",
        "头孢类",
        "porphyria",
        "卟啉病",
        (
            ("cefazolin", "头孢唑林"),
            ("ceftriaxone", "头孢曲松"),
            ("cefepime", "头孢吡肟"),
            ("cefuroxime", "头孢呋辛"),
        ),
    ),
    DrugClass(
        "sulfonamide",
        "磺胺类",
        "renal failure",
        "肾衰竭",
        (
            ("sulfadiazine", "磺胺嘧啶"),
            ("sulfasalazine", "柳氮磺吡啶"),
            ("sulfadoxine", "磺胺多辛"),
            ("sulfacetamide", "磺胺醋酰"),
        ),
    ),
    DrugClass(
        "macrolide",
        "大环内酯类",
        "long QT",
        "长QT综合征",
        (
            ("erythromycin", "红霉素"),
            ("azithromycin", "阿奇霉素"),
            ("clarithromycin", "克拉霉素"),
            ("roxithromycin", "罗红霉素"),
        ),
    ),
    DrugClass(
        "opioid",
        "阿片类",
        "asthma",
        "哮喘",
        (("morphine", "吗啡"), ("fentanyl", "芬太尼"), ("codeine", "可待因"), ("oxycodone", "羟考酮")),
    ),
    DrugClass(
        "NSAID",
        "非甾体抗炎药",
        "peptic ulcer",
        "消化性溃疡",
        (
            ("ibuprofen", "布洛芬"),
            ("naproxen", "萘普生"),
            ("diclofenac", "双氯芬酸"),
            ("ketorolac", "酮咯酸"),
        ),
    ),
    DrugClass(
        "ACE inhibitor",
        "ACE抑制剂",
        "pregnancy",
        "妊娠",
        (
            ("enalapril", "依那普利"),
            ("lisinopril", "赖诺普利"),
            ("ramipril", "雷米普利"),
            ("captopril", "卡托普利"),
        ),
    ),
    DrugClass(
        "beta blocker",
        "β受体阻滞剂",
        "heart block",
        "心脏传导阻滞",
        (
            ("propranolol", "普萘洛尔"),
            ("metoprolol", "美托洛尔"),
            ("atenolol", "阿替洛尔"),
            ("bisoprolol", "比索洛尔"),
        ),
    ),
)

LABS: tuple[LabTest, ...] = (
    LabTest("potassium", "血钾", "mmol/L", 30, 55, 65, 85),
    LabTest("glucose", "血糖", "mmol/L", 40, 110, 200, 260),
    LabTest("lactate", "乳酸", "mmol/L", 5, 20, 40, 80),
    LabTest("urea", "尿素", "mmol/L", 20, 80, 300, 400),
    LabTest("bilirubin", "胆红素", "mg/dL", 2, 30, 120, 180),
    LabTest("INR", "INR", "", 8, 35, 50, 90),
    LabTest("creatinine", "肌酐", "mg/dL", 4, 15, 40, 80),
    LabTest("calcium", "血钙", "mg/dL", 70, 105, 130, 160),
)

_NAMES = """
    Ada Aiko Alan Amir Anna Arun Asha Bao Bela Ben Bo Carl Cai Chen Cora Dai Dana Dan Deng Dina Dora
    Duo Eli Ella Emil Emma Eric Esra Eva Fay Fang Femi Finn Fu Gao Gina Glen Gong Greta Gu Gus Hai
    Hana Hans Hao Hedy Hong Hugo Hui Ian Ida Igor Ines Ira Iris Ivan Jack Jana Jia Jin Joan John
    Jose Juan Jude Jun Kai Kang Karl Kate Ken Kim Kira Kong Kurt Lan Lara Lea Lei Leo Liang Lin Lisa
    Liu Long Luca Lucy Luo Mai Mara Mark Mei Mia Mila Ming Mona Musa Nan Nora Nina Ning Noah Nuo
    Olga Omar Oona Otto Pam Pan Paul Pei Peng Pia Ping Qi Qian Qing Quan Rana Raul Remy Ren Rita
    Rosa Rui Ruth Ryan Sam Sara Sean Shan Shen Sina Siri Song Sora Sven Tang Tara Tao Theo Tian Tina
    Tom Tong Tove Una Uri Ursa Vera Vik Vito Wade Wan Wei Wen Wu Xia Xin Xue Yan Yang Yara Ye Yong
    Yu Yuki Yun Yves Zane Zara Zeng Zhen Zhi Zhou Zhu Zoe Zora Abel Agnes Akira Alma Ana Andre Anton
    Astrid Axel Basil Beth Boris Bruno Celia Clara Clive Cyril Daisy Dario David Edith Edgar Elena
    Elsa Ernst Felix Flora Franz Fred Gerda Gwen Helga Henry Hilda Ivo Jonas Julia Karin Klaus Laura
    Lena Linus Louis Luis Magda Marco Maria Mario Max Nadia Nils Oscar Pablo Pedro Petra Ralf Rene
    Robin Roman Sonja Stan Tania Ulla Viola Wanda Xenia
"""

NAMES: tuple[str, ...] = tuple(_NAMES.split())
"""Patients' names; one record never uses a name twice."""

RATES: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20)
"""Doses in mg per kg."""

WEIGHTS: tuple[int, ...] = tuple(w for w in range(11, 100) if w % 10)
"""Body weights in kg (two digits, none a multiple of ten: each dose takes both steps of the working)."""
