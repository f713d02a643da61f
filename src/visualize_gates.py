"""Draw where the fusion edits reference images, and measure whether it is the right place.

    python src/visualize_gates.py --dataset CIRR --model-path FILE --queries 16
    python src/visualize_gates.py --dataset CIRR --model-path FILE --pairs 12 57
    python src/visualize_gates.py --dataset CIRR --model-path FILE --same-image NAME --captions TEXT TEXT
    python src/visualize_gates.py --dataset CIRR --model-path FILE --queries 4 --per-word
    python src/visualize_gates.py --dataset CIRR --model-path FILE --localisation --off-model-path PLAIN
    python src/visualize_gates.py --dataset CIRR --model-path FILE --probe --queries 0
Writes PNG sheets, one HTML page that needs no network, localisation.csv and probe.csv.
"""

from sprc.errors import run_script
from sprc.gates.settings import GateSettings
from sprc.settings import flag_parser, given_flags


def main() -> None:
    """Parse, then call the library (imported late, so that --help is quick)."""
    settings = GateSettings(**given_flags(flag_parser(__doc__, GateSettings)))
    from sprc.gates.visualisation import run_visualisation

    run_visualisation(settings)


if __name__ == "__main__":
    run_script(main)
