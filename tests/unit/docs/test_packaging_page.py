"""The unit that docs/packaging.md gives to who installs the wheel is the packages' own."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_unit_of_the_page_does_what_that_of_the_packages_does() -> None:
    unit = (ROOT / "packaging/systemd/kvmsec-instances.service").read_text().splitlines()
    page = (ROOT / "docs/packaging.md").read_text().split("\n## The wheel\n")[1].splitlines()
    end = page.index("    WantedBy=multi-user.target") + 1
    shown = [line.strip() for line in page[page.index("    [Unit]") : end]]

    def does(lines: list[str]) -> list[str]:
        return [line for line in lines if line and not line.startswith(("#", "Documentation="))]

    assert does(shown) == does(unit)
