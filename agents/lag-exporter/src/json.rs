//! How times stand in JSON.

/// A [`Duration`](std::time::Duration), or none, as a number of seconds.
pub mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes it.
    ///
    /// # Errors
    ///
    /// Whatever the serializer says.
    pub fn serialize<S: Serializer>(
        span: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        span.map(|span| span.as_secs_f64()).serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// Whatever the deserializer says, or the number is negative, too large or no number.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        let seconds = Option::<f64>::deserialize(deserializer)?;
        seconds.map(Duration::try_from_secs_f64).transpose().map_err(serde::de::Error::custom)
    }
}

/// A position in WAL, or none, as PostgreSQL prints it.
pub mod lsn {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use tokio_postgres::types::PgLsn;

    /// Writes it.
    ///
    /// # Errors
    ///
    /// Whatever the serializer says.
    pub fn serialize<S: Serializer>(lsn: &Option<PgLsn>, serializer: S) -> Result<S::Ok, S::Error> {
        lsn.map(|lsn| lsn.to_string()).serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    ///
    /// Whatever the deserializer says, or it is no position.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PgLsn>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let parse = |text: String| {
            text.parse().map_err(|_| serde::de::Error::custom(format!("`{text}` is no LSN")))
        };
        text.map(parse).transpose()
    }
}
