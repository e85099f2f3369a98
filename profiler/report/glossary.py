"""Every measure of the page in one sentence."""

GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "Uniform share",
        "What each expert would get if all experts of a layer were chosen equally often; 2× means twice that.",
    ),
    (
        "Busiest / mean",
        "Choices of a layer's busiest expert divided by the mean over its experts; 1 is perfectly even.",
    ),
    (
        "Gini coefficient",
        "Unevenness of a layer's experts from 0, all chosen equally often, towards 1, one expert chosen always.",
    ),
    (
        "Affinity",
        "P(e′ at l+1 | e at l): of the tokens that choose expert e in layer l, the share that choose expert e′ in the "
        "next MoE layer.",
    ),
    (
        "Co-activation",
        "Of the tokens that choose one expert, the share that choose the other in the same layer as well.",
    ),
    (
        "Times chance",
        "A share divided by the share of all tokens that choose that expert; above 1× two experts attract each other, "
        "below 1× they avoid each other.",
    ),
    (
        "Mutual information",
        "Bits that a token's expert in one layer tells about its expert in the next one; 0 if they are independent.",
    ),
    (
        "Shuffled control",
        "The same measure after the tokens of the next layer were shuffled, which is what a sample of this size shows "
        "by chance.",
    ),
    (
        "Expected active experts",
        "Distinct experts that a batch of independently drawn tokens chooses in a layer: each one's weights must be "
        "read from memory in that step.",
    ),
    (
        "Total variation",
        "Share of choices that would have to change to turn one distribution into another: 0 is equal, 1 is disjoint.",
    ),
    (
        "Convergence",
        "Total variation between the affinity of the first n tokens, with sequences in random order, and that of all "
        "the others; stable is the first n within 0.05 of what remains at the largest n.",
    ),
    (
        "Drift",
        "Total variation between the popularity of a group of sequences and that of the whole trace, mean over layers.",
    ),
    ("Random control", "The drift of a group of as many sequences put together at random."),
    (
        "Kept on one GPU",
        "Pairs of experts that a token chooses in adjacent layers and that stand on the same GPU, with one copy of "
        "each expert and equal slots; placed by the affinity of even sequences, judged on odd ones.",
    ),
    ("Hit rate", "Share of a token's top-k experts that are among the k predicted, on sequences not learned from."),
    ("Top-1 hit rate", "Share of tokens whose first choice is the first expert predicted."),
    (
        "Batch accuracy",
        "Share of the 2k most popular experts of a batch that the estimate has among its own 2k most popular.",
    ),
    ("Re-plan rate", "Share of batches whose set of 2k most popular experts differs from the estimate."),
    (
        "Precision of the maps",
        "Affinity and co-activation are stored with 8 bits per cell on a square-root scale, so each is off by at most "
        "0.4% of the map's largest value; all other numbers come from exact counts.",
    ),
)
