"""Print how far this implementation is from each golden file: `python -m tests.golden_table`."""

from tests.models.test_swin_autoencoder import FILES, golden_errors


def main():
    print("| file | loss (relative) | encoder output | prediction | gradients (of their norm) |")
    print("|---|---|---|---|---|")
    for name in FILES:
        errors = golden_errors(name)
        print(f"| `{name}` | " + " | ".join(f"{error:.1e}" for error in errors[:4]) + " |")


if __name__ == "__main__":
    main()
