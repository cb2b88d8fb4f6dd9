"""What must be bent for CPU ranks and for packages that are absent or broken: every global side effect is here."""
