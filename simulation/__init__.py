"""A seeded world for `covey.control`: many control machines, a bad network, dying processes, impatient people."""
