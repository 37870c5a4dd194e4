"""The paper's experiments, and one of registration: short scripts over the public API. See README.md."""
