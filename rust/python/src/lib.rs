//! The native module `pdrs._core`: registration only.

#![allow(clippy::needless_pass_by_value, reason = "PyO3 asks for owned arguments")]

mod files;
mod index_map;
mod moves;
mod parameter_dict;
mod python;
mod ranks;
mod stacked;
mod torch;

use pyo3::prelude::*;

// Free-threaded builds of Python are not tested yet: there this makes Python switch its GIL on.
#[pymodule(gil_used = true)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::files::names::{
        apply_names, changed_rows, copy_rows, crc32, diff_names, hash_names, names_by_bucket, names_without_words,
        pack_names, reorder_names, searchable_size, unpack_header, unpack_names, words_behind,
    };
    #[pymodule_export]
    use super::files::safetensors::{SafetensorsHeader, SafetensorsStack, safetensors_entries, safetensors_shards};
    #[pymodule_export]
    use super::files::shard_index::{ShardIndex, shard_lines};
    #[pymodule_export]
    use super::index_map::{IndexMap, NameIterator};
    #[pymodule_export]
    use super::moves::commit::complete_move;
    #[pymodule_export]
    use super::moves::pages::{map_over, use_huge_pages};
    #[pymodule_export]
    use super::moves::tensor_group::{TensorGroup, group_tensors, slab_views};
    #[pymodule_export]
    use super::moves::walk::{all_kept, collect_parameters, walk_modules};
    #[pymodule_export]
    use super::parameter_dict::entries::{
        can_take_over, clear_entries, delete_entry, get_entry, in_step, insert_all, pop_end, pop_entry, prepare,
        save_parameters, set_entry, take_over, unzip,
    };
    #[pymodule_export]
    use super::parameter_dict::iterate::EntryIterator;
    #[pymodule_export]
    use super::parameter_dict::keys::{EntryKeys, KeyIterator};
    #[pymodule_export]
    use super::parameter_dict::load::{load_matching, not_copied_yet, place_copies, unexpected_keys};
    #[pymodule_export]
    use super::python::lock::{Lock, Stay};
    #[pymodule_export]
    use super::python::one_step::in_one_step;
    #[pymodule_export]
    use super::python::type_slots::use_native_slots;
    #[pymodule_export]
    use super::ranks::headers::Headers;
    #[pymodule_export]
    use super::ranks::known_rows::{KnownRows, Request, answer_asked, asked_bytes, asked_names};
    #[pymodule_export]
    use super::stacked::one_entry::{pop_end_entry_row, pop_entry_row, set_entry_row};
    #[pymodule_export]
    use super::stacked::packed::check_words;
    #[pymodule_export]
    use super::stacked::places::Places;
    #[pymodule_export]
    use super::stacked::plan::RowPlan;
    #[pymodule_export]
    use super::stacked::row::{sort_tensors, zero_row, zero_row_of_state, zero_rows};
    #[pymodule_export]
    use super::stacked::row_index::RowIndex;
    #[pymodule_export]
    use super::stacked::row_step::{RowRule, RowStep, sum_repeated_rows, write_row_steps};
    #[pymodule_export]
    use super::stacked::walk::RowIterator;
    #[pymodule_export]
    use super::torch::own_functions::{are_functions_own, is_own, watch_functions};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::moves::pages::keep_reserve();
        super::python::interpreter::require_main(module.py())
    }
}
