"""Which fields of forms about recordings are lists, numbers and flags.

It holds names alone, and refuses to judge what a field says.
"""

from forebay.dialects.openai.form_fields import FormFields

AUDIO_FORM = FormFields(
    numbers=frozenset(
        {
            *("temperature", "temperatures", "beam_size", "best_of", "patience", "length_penalty"),
            *("repetition_penalty", "no_repeat_ngram_size", "compression_ratio_threshold", "log_prob_threshold"),
            *("no_speech_threshold", "suppress_tokens", "vad_onset", "vad_offset", "vad_min_speech_ms"),
            *("vad_min_silence_ms", "vad_pad_ms", "chunk_seconds", "speakers", "speakers_min", "speakers_max"),
            *("num_speakers", "min_speakers", "max_speakers"),
            *("threshold", "prefix_padding_ms", "silence_duration_ms"),
        }
    ),
    flags=frozenset({"background", "diarize", "character_alignments", "stream", "suppress_numerals", "vad"}),
    lists=frozenset(
        {
            *("timestamp_granularities", "include", "languages", "keywords", "temperatures", "suppress_tokens"),
            *("known_speaker_names", "known_speaker_references"),
        }
    ),
    large=frozenset({"known_speaker_references", "segments", "transcript", "url"}),
    structured=frozenset({"segments", "chunking_strategy"}),
    nested={"chunking_strategy": ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")},
)
