"""What a compiled program holds on one device, by the compiler's own account."""


def held_bytes(program: object) -> int | None:
    """Arguments, results that are not in an argument's place, and temporaries.

    None of what is no compiled program, as under a parameter server.
    """
    analysis = getattr(program, "memory_analysis", lambda: None)()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    )  # fmt: skip
