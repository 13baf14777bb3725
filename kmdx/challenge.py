"""The challenge's stems, sample rate and limits (MDX23), and names of a song's other signals."""

STEMS = ("bass", "drums", "other", "vocals")
MIXTURE = "mixture"
ACCOMPANIMENT = "accompaniment"
"""The mixture minus the vocals; can be asked of every plan that has vocals."""
STREAMS = (MIXTURE, "drums", "bass", "other", "vocals")
"""Order of the streams in a MUSDB18 file."""

RATE = 44100  # Hz, of the challenge's songs and of MUSDB18
CHANNELS = 2

TIME_FACTOR = 1.57  # seconds that a submission may take per second of song
MEMORY = 16 * 10**9  # bytes of host memory that it may use
