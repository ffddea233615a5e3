//! [`debug_fields`]: `Debug` of the types that have secrets, or what cannot be shown.

/// Implements `Debug` with these fields and no others: `debug_fields!(Secret |it| { length: it.text.len() });`.
macro_rules! debug_fields {
    ($type:ident $(<$($param:ident $(: $bound:ident)?),+>)? |$it:pat_param| { $($field:ident: $value:expr),* }) => {
        impl $(<$($param $(: $bound)?),+>)? std::fmt::Debug for $type $(<$($param),+>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let $it = self;
                f.debug_struct(stringify!($type))$(.field(stringify!($field), &$value))*.finish_non_exhaustive()
            }
        }
    };
}

pub(crate) use debug_fields;
