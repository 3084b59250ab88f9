//! Lanes over TCP. Bytes only: what to send and when is decided in `pageferry-datapath`.
