"""The stems, sample rate and limits of the challenge (MDX23), and the names of a song's other signals."""

STEMS = ("bass", "drums", "other", "vocals")
MIXTURE = "mixture"
ACCOMPANIMENT = "accompaniment"
"""The mixture minus the vocals; every plan that has vocals can produce it."""
WITHOUT_VOCALS = (ACCOMPANIMENT, "instrumental")
"""Names of the mixture minus the vocals, besides ``no_vocals``."""
WITHOUT = "no_"
"""Before the name of a stem: the mixture minus this stem."""
STREAMS = (MIXTURE, "drums", "bass", "other", "vocals")
"""The order of the streams in a MUSDB18 file."""

RATE = 44100  # Hz, of the challenge's songs and of MUSDB18
CHANNELS = 2

TIME_FACTOR = 1.57  # a submission's time limit, in seconds per second of song
MEMORY = 16 * 10**9  # its limit on host memory, in bytes
