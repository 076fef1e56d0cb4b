//! The wall clock, and how PostgreSQL counts and writes time.

/// Microseconds from 1970-01-01 to PostgreSQL's epoch, 2000-01-01.
pub const PG_EPOCH_MICROS: i64 = 946_684_800_000_000;

/// The wall clock, microseconds since 1970-01-01 UTC.
pub fn unix_micros() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as i64)
}

/// `YYYY-MM-DD HH:MM:SS.ffffff+00` of microseconds since 1970-01-01 UTC.
pub fn timestamp(unix_micros: i64) -> String {
    let (days, micros) = (
        unix_micros.div_euclid(86_400_000_000),
        unix_micros.rem_euclid(86_400_000_000),
    );
    // Civil date from a day count, with years that start in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{fraction:06}+00")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_civil() {
        assert_eq!(timestamp(0), "1970-01-01 00:00:00.000000+00");
        assert_eq!(timestamp(PG_EPOCH_MICROS), "2000-01-01 00:00:00.000000+00");
        assert_eq!(
            timestamp(951_782_400_000_001),
            "2000-02-29 00:00:00.000001+00"
        );
    }
}
